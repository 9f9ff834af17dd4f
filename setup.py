from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
extras = {
    k.removesuffix("_requirements"): v.split()
    for k, v in cfg.items()
    if k.endswith("_requirements")
}
lib = cfg["lib_name"]
folders = ("", "methods/", "plan/", "accelerate/", "studies/")  # of configs

setup(
    name=lib,
    version=cfg["version"],
    description=cfg["description"],
    keywords=cfg["keywords"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=[*find_packages(include=[lib, f"{lib}.*"]), f"{lib}.configs", f"{lib}.results"],
    package_dir={lib: lib, f"{lib}.configs": "configs", f"{lib}.results": "results"},
    package_data={
        f"{lib}.configs": [f"{folder}*.yaml" for folder in folders],
        f"{lib}.results": ["reported.json"],
    },
    include_package_data=False,
    python_requires=">=" + cfg["min_python"],
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": cfg["console_scripts"].split("\n"),
        "nbdev": [f"{lib}={cfg['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)

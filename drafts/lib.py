"Notebook from a plain file: blocks begin with '%% md' or '%% code [id]'."
import json,re,sys
from pathlib import Path
def build(text):
    cells=[]
    for block in re.split(r'^%% ',text,flags=re.M)[1:]:
        head,_,body=block.partition('\n')
        kind,id=head.split()
        body=body.strip('\n')
        c={'cell_type':'markdown' if kind=='md' else 'code','id':id,'metadata':{},'source':body.splitlines(keepends=True)}
        if kind!='md': c={'cell_type':'code','execution_count':None,'id':id,'metadata':{},'outputs':[],'source':c['source']}
        cells.append(c)
    return {'cells':cells,'metadata':{'kernelspec':{'display_name':'python3','language':'python','name':'python3'}},'nbformat':4,'nbformat_minor':5}
if __name__=='__main__':
    src,dst=sys.argv[1:]
    nb=build(Path(src).read_text())
    Path(dst).write_text(json.dumps(nb,ensure_ascii=False,indent=1)+'\n')

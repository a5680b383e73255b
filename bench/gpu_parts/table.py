"""x"""
def text(run): return str({k: (v.status, v.reason) for k,v in run.parts.items()})

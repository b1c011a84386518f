"""`potstill launch`: a job file to what starts the job on a machine, a Slurm cluster, a Ray cluster or a cloud.

    config      what a job file may say
    nodes       what every node runs, the same under all launchers
    render      that, wrapped for one launcher
    recipes     whether the recipe is for such a job
    check       what can be said of a rendered file before it is submitted
    start       all of that, and the launcher itself
    ray_nodes   one task a node of a Ray cluster

A job that is stopped ends with exit code 75 and is started again by whoever stopped it; every command of potstill's
goes on from what it has kept.
"""

"""Where engines run: in this process, or in a worker process beside it.

The owner (the process that holds the lock) hands a worker a task, which is a function of values, and gets
values back. A worker has the engines and knows no folder but that of the engines' own files, no store and
no queue. Work may be done twice; publication, which is the owner's, happens once.
"""

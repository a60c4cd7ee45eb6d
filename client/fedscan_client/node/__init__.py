"""The hospital's node: Flower's SuperNode for the network, and an executor and task runner of ours for the work.

start.py       `fedscan agent start`: keeps both running, pauses, publishes the policy and the log's anchor
supernode.py   Flower's SuperNode, which never opens a foreign bundle
executor.py    takes tasks from the SuperNode, one at a time, each in a process forked from a warm one
task.py        one task: guard, have the worker run the installed ClientApp, send the reply
worker.py      one process for all tasks, which keeps the cohort in memory from round to round
inspect.py     the guard: what a task may look like before anything of it is used
flower.py      the one version of Flower this was written for, and the environment of every process
status.py      what `fedscan agent status` tells; pause, resume and stop
"""

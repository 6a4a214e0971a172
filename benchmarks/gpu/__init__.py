"""What can only be measured on a GPU machine, with one command: ``make gpu-bench``.

Each part is a module with ``run(bench) -> Iterable[Bar]``; `__main__` runs them one by one, each in a process of
its own with a time limit of its own.
"""

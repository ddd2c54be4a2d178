"""The open-loop generator: a Locust program that plays a plan, in a process of its own.

Importing `loadtest.generator.__main__` imports Locust, which patches the process for gevent.
"""

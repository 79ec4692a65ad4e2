"""stub"""


def tree(model, to=None):
    return ""


class Visualization:
    pass


def log(*a):
    print("log")

"""Leaves as it is told to."""

import os
import signal
import sys
import threading
import time


def own_hook(kind, error, traceback):
    print("own hook:", kind.__name__, error, traceback.tb_frame.f_code.co_name)


match sys.argv[1]:
    case "number":
        sys.exit(3)
    case "text":
        sys.exit("a text")
    case "none":
        sys.exit()
    case "zero":
        sys.exit(0)
    case "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    case "raise":
        raise KeyError("a key")
    case "hook":
        sys.excepthook = own_hook
        raise ValueError("for the hook")
    case "abrupt":
        os._exit(7)
    case "thread":
        threading.Thread(target=lambda: (time.sleep(0.2), print("thread done"))).start()
    case "fork":
        if os.fork() == 0:
            print("child", flush=True)
        else:
            os.wait()
            print("parent")

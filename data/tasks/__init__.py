"""Tasks: sequences made by a rule, with a vocabulary of their own, a chance level and an oracle. In reading order:

    task               what every task is
    induction          what followed the mark last time
    selective_copying  symbols among noise, in their order
    mqar               keys and values, every key asked once more
    phonebook          names and numbers, one name asked; also told before the book
    state_tracking     running products in a group: parity, S3, A5, S5

`python train.py --data task:induction:length=64` trains on one, `python eval.py task` judges.
"""

from data.tasks.induction import Induction
from data.tasks.mqar import MultiQueryRecall
from data.tasks.phonebook import Phonebook
from data.tasks.selective_copying import SelectiveCopying
from data.tasks.state_tracking import A5, S3, S5, Parity
from data.tasks.task import TRAINING, VALIDATION, Task

__all__ = ["TASKS", "TRAINING", "VALIDATION", "Task"]
TASKS = {
    "induction": Induction,
    "selective_copying": SelectiveCopying,
    "mqar": MultiQueryRecall,
    "phonebook": Phonebook,
    "parity": Parity,
    "s3": S3,
    "a5": A5,
    "s5": S5,
}

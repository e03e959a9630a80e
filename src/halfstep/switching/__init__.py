"""Put a recipe on a program: region, working copies, loss scale, optimizer side."""

from halfstep.switching.audit_table import Audit, AuditRow, BrokenPromise, Held
from halfstep.switching.emulation import Emulation, EmulationSummary, emulate
from halfstep.switching.explanation import Explanation
from halfstep.switching.facades import GradScaler, autocast
from halfstep.switching.inspection import Finding
from halfstep.switching.loss_scale import LossScale, StepReason, StepReport
from halfstep.switching.plan import Executor, Plan, PlanRow, make_plan
from halfstep.switching.reports import Handle, log_to, on_applied
from halfstep.switching.switch import Switch, switch

__all__ = [
    "Audit",
    "AuditRow",
    "BrokenPromise",
    "Emulation",
    "EmulationSummary",
    "Executor",
    "Explanation",
    "Finding",
    "GradScaler",
    "Handle",
    "Held",
    "LossScale",
    "Plan",
    "PlanRow",
    "StepReason",
    "StepReport",
    "Switch",
    "autocast",
    "emulate",
    "log_to",
    "make_plan",
    "on_applied",
    "switch",
]

"""Find likely wrong labels with a frozen network and without training, review and correct them."""

from sanm_lightning.audit.callback import LabelAudit
from sanm_lightning.audit.label_issues import LabelIssues, read_label_issues, write_label_issues
from sanm_lightning.audit.report import write_report
from sanm_lightning.audit.run import AuditResult, audit_set
from sanm_lightning.audit.run_folder import read_noise_rate, write_audit
from sanm_lightning.audit.sets import AuditSet, audit_set_of, folder_audit_set

__all__ = [
    "AuditResult",
    "AuditSet",
    "LabelAudit",
    "LabelIssues",
    "audit_set",
    "audit_set_of",
    "folder_audit_set",
    "read_label_issues",
    "read_noise_rate",
    "write_audit",
    "write_label_issues",
    "write_report",
]

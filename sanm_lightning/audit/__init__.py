"""Find likely wrong labels with a frozen network and without training, review and correct them."""

from sanm_lightning.audit.label_issues import LabelIssues, read_label_issues, write_label_issues
from sanm_lightning.audit.report import write_report
from sanm_lightning.audit.run import AuditResult, AuditSet, audit_set, write_audit

__all__ = [
    "AuditResult",
    "AuditSet",
    "LabelIssues",
    "audit_set",
    "read_label_issues",
    "write_audit",
    "write_label_issues",
    "write_report",
]

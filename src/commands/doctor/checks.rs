//! What the doctor checks, as data: each operation, what needs it, and what its lack costs.

/// What depends on an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Need {
    Export,
    Import,
    /// Without it exports and imports work, at a cost that [`Check::without`] names.
    Comfort(&'static str),
}

impl Need {
    pub(super) fn name(self) -> &'static str {
        match self {
            Need::Export => "export",
            Need::Import => "import",
            Need::Comfort(name) => name,
        }
    }
}

/// One operation that is tried out.
pub(super) struct Check {
    pub(super) step: Step,
    pub(super) name: &'static str,
    pub(super) needed_for: &'static [Need],
    /// What follows if it does not work.
    pub(super) without: &'static str,
    pub(super) permission: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    List,
    Absent,
    Put,
    Head,
    Get,
    GetRange,
    CreateUpload,
    UploadPart,
    ListParts,
    ListUploads,
    Complete,
    Abort,
    Copy,
    Delete,
}

impl Step {
    /// Whether it can be tried where nothing is written.
    pub(super) fn only_reads(self) -> bool {
        use Step::{Absent, Get, GetRange, Head, List};
        matches!(self, List | Absent | Head | Get | GetRange)
    }
}

/// In the order in which they are tried.
pub(super) const CHECKS: [Check; 14] = [
    Check {
        step: Step::List,
        name: "list objects",
        needed_for: &[
            Need::Comfort("ls"),
            Need::Comfort("verify"),
            Need::Comfort("prune"),
            Need::Comfort("speed"),
        ],
        without: "ls, verify and prune fail, and each blob is looked up by a request of its own",
        permission: "s3:ListBucket",
    },
    Check {
        step: Step::Absent,
        name: "look for a missing object",
        needed_for: &[Need::Export, Need::Import],
        without: "a blob or cache that is not there yet looks like a refusal",
        permission: "s3:ListBucket and s3:GetObject",
    },
    Check {
        step: Step::Put,
        name: "put an object",
        needed_for: &[Need::Export],
        without: "nothing can be exported",
        permission: "s3:PutObject",
    },
    Check {
        step: Step::Head,
        name: "look for an object",
        needed_for: &[Need::Export, Need::Import],
        without: "exports and imports cannot tell which blobs are there",
        permission: "s3:GetObject",
    },
    Check {
        step: Step::Get,
        name: "get an object",
        needed_for: &[Need::Import],
        without: "nothing can be imported",
        permission: "s3:GetObject",
    },
    Check {
        step: Step::GetRange,
        name: "get a range of an object",
        needed_for: &[Need::Comfort("speed")],
        without: "a large blob is fetched in one stream, and from its start if that breaks off",
        permission: "s3:GetObject",
    },
    Check {
        step: Step::CreateUpload,
        name: "start a multipart upload",
        needed_for: &[Need::Export],
        without: "large blobs cannot be exported",
        permission: "s3:PutObject",
    },
    Check {
        step: Step::UploadPart,
        name: "upload a part",
        needed_for: &[Need::Export],
        without: "large blobs cannot be exported",
        permission: "s3:PutObject",
    },
    Check {
        step: Step::ListParts,
        name: "list parts",
        needed_for: &[Need::Comfort("resuming")],
        without: "an interrupted upload of a large blob starts over",
        permission: "s3:ListMultipartUploadParts",
    },
    Check {
        step: Step::ListUploads,
        name: "list multipart uploads",
        needed_for: &[Need::Comfort("resuming")],
        without: "interrupted uploads are not found: they start over, and their parts stay and cost \
                  money until a lifecycle rule aborts them",
        permission: "s3:ListBucketMultipartUploads",
    },
    Check {
        step: Step::Complete,
        name: "complete a multipart upload",
        needed_for: &[Need::Export],
        without: "large blobs cannot be exported",
        permission: "s3:PutObject",
    },
    Check {
        step: Step::Abort,
        name: "abort a multipart upload",
        needed_for: &[Need::Comfort("cleaning up")],
        without: "the parts of a failed upload stay and cost money until a lifecycle rule aborts it",
        permission: "s3:AbortMultipartUpload",
    },
    Check {
        step: Step::Copy,
        name: "copy an object onto itself",
        needed_for: &[Need::Comfort("refreshing")],
        without: "old blobs are uploaded again, or else expire although they are in use",
        permission: "s3:GetObject and s3:PutObject",
    },
    Check {
        step: Step::Delete,
        name: "delete an object",
        needed_for: &[Need::Comfort("prune"), Need::Comfort("verify --repair")],
        without: "only a lifecycle rule removes what is no longer used",
        permission: "s3:DeleteObject",
    },
];

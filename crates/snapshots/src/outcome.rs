//! What a `Prepare` that offers to skip a layer comes to, and why: a pure decision, reported in log, metric and event
//! alike.

use std::fmt;

use millstream_oci::Digest;
use millstream_source::ErrorKind;

/// Why something is not lazy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reason {
    /// Stable code, for logs, events and documents.
    pub code: &'static str,
    /// For a person; with `hint:` where there is something to do.
    pub message: String,
}

impl Reason {
    /// A reason.
    pub fn new(code: &'static str, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}: {}", self.code, self.message)
    }
}

/// The answer to one `Prepare` that offers to skip a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PrepareOutcome {
    /// The layer is shown without being unpacked.
    Lazy {
        /// Digest of its blob.
        layer: Digest,
    },
    /// The same, but every byte of the layer is here already.
    Local {
        /// Digest of its blob.
        layer: Digest,
    },
    /// containerd downloads and unpacks it, as always.
    Deferred {
        /// Why.
        reason: Reason,
    },
    /// Something of ours broke; containerd downloads and unpacks it, as always.
    Failed {
        /// What.
        reason: Reason,
    },
}

impl PrepareOutcome {
    /// Stable name for logs and metrics.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Lazy { .. } => "lazy",
            Self::Local { .. } => "local",
            Self::Deferred { .. } => "deferred",
            Self::Failed { .. } => "failed",
        }
    }

    /// Shorthand for [`PrepareOutcome::Deferred`].
    pub fn deferred(code: &'static str, message: impl Into<String>) -> Self {
        Self::Deferred { reason: Reason::new(code, message) }
    }
}

/// What came of asking somebody.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer<T> {
    /// They answered.
    Got(T),
    /// They refused, or could not be asked.
    Failed {
        /// In which way.
        kind: ErrorKind,
        /// What was tried, on what, why it failed.
        message: String,
    },
    /// No answer before the deadline.
    TimedOut,
}

/// What the server says about one layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LayerAnswer {
    /// It has a TOC.
    Eligible,
    /// It cannot be lazy.
    Ineligible {
        /// Why.
        reason: String,
    },
    /// It cannot be lazy yet: its import is not complete.
    Pending {
        /// Why, and what happens next.
        reason: String,
    },
}

/// Everything the decision about an image rests on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageInputs {
    /// Whether this node streams new images at all.
    pub streaming: bool,
    /// What is needed to know the image and is missing, in words; none when it is known.
    pub missing: Option<String>,
    /// Whether every layer is wholly here and verified: then neither the server nor range requests are needed, the
    /// right to read still is.
    pub local: bool,
    /// Whether the chain IDs computed from the diff IDs at hand are those that containerd asks for.
    pub chain_matches: bool,
    /// The server's answer: every layer of the image, bottom first.
    pub server: Answer<Vec<LayerAnswer>>,
    /// The probe's answer: this caller may read the image, and this node can read its blobs by range.
    pub probe: Answer<()>,
}

/// What becomes of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageDecision {
    /// The layers below `lazy` are lazy. The others are containerd's: it downloads everything above the first layer
    /// that is not skipped, so nothing above that one can be lazy either.
    Lazy {
        /// How many layers from the bottom are lazy; at least one.
        lazy: usize,
        /// Why the rest is not; none when every layer is lazy.
        rest: Option<Reason>,
    },
    /// Every layer is here already.
    Local,
    /// No layer is lazy.
    Deferred(Reason),
}

/// Decides about an image. What the registry says comes before what the server says: whoever may not read an image learns
/// that, and nothing else.
#[must_use]
pub fn decide_image(inputs: &ImageInputs) -> ImageDecision {
    match refusal(inputs) {
        Some(reason) => ImageDecision::Deferred(reason),
        None if inputs.local => ImageDecision::Local,
        None => match &inputs.server {
            Answer::Got(layers) => eligible_run(layers),
            Answer::Failed { kind, message } => ImageDecision::Deferred(server_reason(*kind, message)),
            Answer::TimedOut => ImageDecision::Deferred(Reason::new(
                "server.slow",
                "the server did not answer in time; hint: import the image before, or raise the deadline of decisions",
            )),
        },
    }
}

/// What makes an image ineligible before anybody is asked: streaming is switched off on this node, or what is needed to know
/// the image is `missing` (in words).
#[must_use]
pub fn precondition(streaming: bool, missing: Option<&str>) -> Option<Reason> {
    if !streaming {
        let text = "streaming is switched off on this node; hint: millstream streaming on";
        return Some(Reason::new("node.streaming-off", text));
    }
    let missing = missing?;
    let hint = "hint: set disable_snapshot_annotations = false in containerd's configuration";
    Some(Reason::new("labels.missing", format!("{missing}; {hint}")))
}

/// What makes every layer ineligible, apart from the server.
fn refusal(inputs: &ImageInputs) -> Option<Reason> {
    if let Some(reason) = precondition(inputs.streaming, inputs.missing.as_deref()) {
        return Some(reason);
    }
    match &inputs.probe {
        Answer::Got(()) => {}
        Answer::Failed { kind: ErrorKind::NoRange, .. } if inputs.local => {}
        Answer::Failed { kind, message } => return Some(registry_reason(*kind, message)),
        Answer::TimedOut => {
            return Some(Reason::new("registry.slow", "the registry did not answer in time"));
        }
    }
    // Without the server's answer there may be no diff IDs to compare; that reason is the better one to show.
    let comparable = inputs.local || matches!(inputs.server, Answer::Got(_));
    (comparable && !inputs.chain_matches).then(|| {
        let text = "the layers known for this image are not those that containerd asks for";
        Reason::new("image.mismatch", text)
    })
}

/// How far laziness reaches from the bottom.
fn eligible_run(layers: &[LayerAnswer]) -> ImageDecision {
    let first = layers.iter().enumerate().find_map(|(number, layer)| match layer {
        LayerAnswer::Eligible => None,
        LayerAnswer::Ineligible { reason } => Some((number, "image.not-eligible", "lazy", reason)),
        LayerAnswer::Pending { reason } => Some((number, "server.not-imported", "lazy yet", reason)),
    });
    match first {
        None if layers.is_empty() => {
            ImageDecision::Deferred(Reason::new("image.not-eligible", "the image has no layers"))
        }
        None => ImageDecision::Lazy { lazy: layers.len(), rest: None },
        Some((number, code, lazy, reason)) => {
            let text = format!("layer {} of {} cannot be {lazy}: {reason}", number + 1, layers.len());
            let reason = Reason::new(code, text);
            if number == 0 {
                ImageDecision::Deferred(reason)
            } else {
                ImageDecision::Lazy { lazy: number, rest: Some(reason) }
            }
        }
    }
}

fn registry_reason(kind: ErrorKind, message: &str) -> Reason {
    let (code, hint) = match kind {
        ErrorKind::Unauthorized => ("registry.unauthorized", "; hint: give the node a credential for this registry"),
        ErrorKind::Denied => ("registry.denied", "; hint: this credential may not read the image"),
        ErrorKind::NotFound => ("registry.not-found", ""),
        ErrorKind::Exhausted => ("registry.rate-limited", ""),
        ErrorKind::NoRange => ("registry.no-range", "; hint: a proxy between node and registry may drop ranges"),
        ErrorKind::TimedOut => ("registry.slow", ""),
        ErrorKind::Unavailable => ("registry.unreachable", "; hint: can this node reach the registry?"),
        ErrorKind::NotImported | ErrorKind::NotEligible | ErrorKind::Malformed | ErrorKind::DigestMismatch => {
            ("registry.malformed", "")
        }
        ErrorKind::Local => ("node.local", "; hint: see the log of millstreamd"),
    };
    Reason::new(code, format!("{message}{hint}"))
}

fn server_reason(kind: ErrorKind, message: &str) -> Reason {
    let (code, hint) = match kind {
        ErrorKind::Unauthorized | ErrorKind::Denied => ("server.denied", ""),
        ErrorKind::NotFound | ErrorKind::NotImported => ("server.not-imported", "; hint: millstream import IMAGE"),
        ErrorKind::NotEligible => ("image.not-eligible", "; hint: millstream explain IMAGE"),
        ErrorKind::Exhausted => ("server.exhausted", ""),
        ErrorKind::NoRange | ErrorKind::Malformed | ErrorKind::DigestMismatch => ("server.malformed", ""),
        ErrorKind::TimedOut => ("server.slow", "; hint: import the image before it is needed"),
        ErrorKind::Unavailable => ("server.unreachable", "; hint: does millstream-server run at server.address?"),
        ErrorKind::Local => ("node.local", "; hint: see the log of millstreamd"),
    };
    // The server knows better than we do what helps.
    let hint = if message.contains("hint:") { "" } else { hint };
    Reason::new(code, format!("{message}{hint}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> ImageInputs {
        ImageInputs {
            streaming: true,
            missing: None,
            local: false,
            chain_matches: true,
            server: Answer::Got(vec![LayerAnswer::Eligible; 3]),
            probe: Answer::Got(()),
        }
    }

    fn failed<T>(kind: ErrorKind) -> Answer<T> {
        Answer::Failed { kind, message: "tried it".into() }
    }

    fn code(decision: &ImageDecision) -> &'static str {
        match decision {
            ImageDecision::Lazy { rest: None, .. } => "lazy",
            ImageDecision::Lazy { rest: Some(_), .. } => "partly",
            ImageDecision::Local => "local",
            ImageDecision::Deferred(reason) => reason.code,
        }
    }

    const KINDS: [(ErrorKind, &str, &str); 12] = [
        (ErrorKind::Unauthorized, "registry.unauthorized", "server.denied"),
        (ErrorKind::Denied, "registry.denied", "server.denied"),
        (ErrorKind::NotFound, "registry.not-found", "server.not-imported"),
        (ErrorKind::NotImported, "registry.malformed", "server.not-imported"),
        (ErrorKind::NotEligible, "registry.malformed", "image.not-eligible"),
        (ErrorKind::Exhausted, "registry.rate-limited", "server.exhausted"),
        (ErrorKind::NoRange, "registry.no-range", "server.malformed"),
        (ErrorKind::Malformed, "registry.malformed", "server.malformed"),
        (ErrorKind::DigestMismatch, "registry.malformed", "server.malformed"),
        (ErrorKind::TimedOut, "registry.slow", "server.slow"),
        (ErrorKind::Unavailable, "registry.unreachable", "server.unreachable"),
        (ErrorKind::Local, "node.local", "node.local"),
    ];

    #[test]
    fn every_failure_has_its_code() {
        for (kind, registry, server) in KINDS {
            assert_eq!(code(&decide_image(&ImageInputs { probe: failed(kind), ..good() })), registry, "{kind:?}");
            assert_eq!(code(&decide_image(&ImageInputs { server: failed(kind), ..good() })), server, "{kind:?}");
            // The registry's word comes first.
            let both = ImageInputs { probe: failed(kind), server: failed(kind), ..good() };
            assert_eq!(code(&decide_image(&both)), registry, "{kind:?}");
        }
    }

    #[test]
    fn the_table() {
        let local = || ImageInputs { local: true, ..good() };
        let cases = [
            ("lazy", good()),
            ("node.streaming-off", ImageInputs { streaming: false, probe: Answer::TimedOut, ..good() }),
            ("labels.missing", ImageInputs { missing: Some("no image reference".into()), ..good() }),
            ("registry.slow", ImageInputs { probe: Answer::TimedOut, ..good() }),
            ("server.slow", ImageInputs { server: Answer::TimedOut, ..good() }),
            ("image.mismatch", ImageInputs { chain_matches: false, ..good() }),
            ("server.slow", ImageInputs { chain_matches: false, server: Answer::TimedOut, ..good() }),
            ("image.not-eligible", ImageInputs { server: Answer::Got(vec![]), ..good() }),
            ("local", local()),
            ("local", ImageInputs { server: Answer::TimedOut, ..local() }),
            ("local", ImageInputs { probe: failed(ErrorKind::NoRange), ..local() }),
            ("registry.denied", ImageInputs { probe: failed(ErrorKind::Denied), ..local() }),
            ("registry.unreachable", ImageInputs { probe: failed(ErrorKind::Unavailable), ..local() }),
            ("image.mismatch", ImageInputs { chain_matches: false, ..local() }),
            ("node.streaming-off", ImageInputs { streaming: false, ..local() }),
        ];
        for (expected, inputs) in cases {
            assert_eq!(code(&decide_image(&inputs)), expected, "{inputs:?}");
        }
    }

    #[test]
    fn laziness_reaches_up_to_the_first_layer_that_cannot() {
        let decide = |pattern: &str| {
            let layers = pattern.chars().map(|layer| match layer {
                '+' => LayerAnswer::Eligible,
                _ => LayerAnswer::Ineligible { reason: "zstd in one frame".into() },
            });
            match decide_image(&ImageInputs { server: Answer::Got(layers.collect()), ..good() }) {
                ImageDecision::Lazy { lazy, rest } => (lazy, rest.map(|reason| reason.message)),
                ImageDecision::Deferred(reason) => (0, Some(reason.message)),
                ImageDecision::Local => unreachable!("not local"),
            }
        };
        let pending = LayerAnswer::Pending { reason: "nobody read it".into() };
        let layers = vec![LayerAnswer::Eligible, pending];
        match decide_image(&ImageInputs { server: Answer::Got(layers), ..good() }) {
            ImageDecision::Lazy { lazy: 1, rest: Some(rest) } => {
                assert_eq!(rest.to_string(), "server.not-imported: layer 2 of 2 cannot be lazy yet: nobody read it");
            }
            other => panic!("{other:?}"),
        }
        let third = Some("layer 3 of 4 cannot be lazy: zstd in one frame".to_owned());
        assert_eq!(decide("++-+"), (2, third));
        assert_eq!(decide("++++"), (4, None));
        assert_eq!(decide("-+").0, 0);
        assert_eq!(decide("+-+-").0, 1);
    }
}

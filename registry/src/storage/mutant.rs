//! Switches off one step of the protocol between writers and collectors, to see that the tests notice.

use std::cell::Cell;

/// A step that is left out.
#[allow(clippy::enum_variant_names, reason = "each is the lack of something")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mutant {
    /// Writers don't wait for markers.
    NoWait,
    /// Collectors don't look again at links behind the marker.
    NoSecondLook,
    /// Collectors don't look again at manifests behind the marker.
    NoSecondReading,
    /// Collectors don't look again whether content has a link.
    NoSecondLinks,
    /// Collectors go on however long their marker is there.
    NoDeadline,
    /// Collectors don't look whether the clock was set back.
    NoLookAtClock,
    /// Pushes don't look for their manifest after the tags.
    NoLookAfterTags,
    /// Deletes don't look for tags again after the manifest is gone.
    NoSecondTags,
    /// Retention doesn't look again at tags and manifests behind the marker.
    NoSecondDecision,
}

thread_local! {
    static MUTANT: Cell<Option<Mutant>> = const { Cell::new(None) };
}

/// Whether this step is left out on this thread.
pub(crate) fn is(mutant: Mutant) -> bool {
    MUTANT.get() == Some(mutant)
}

/// Leaves a step out on this thread, or none.
pub(crate) fn set(mutant: Option<Mutant>) {
    MUTANT.set(mutant);
}

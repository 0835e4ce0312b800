//! Bugs of the predecessor's kind, planted to see that the simulation finds them.

/// What is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bug {
    /// The row never hears that its deadline has ended it.
    TimeoutNotTold,
    /// What failed is raised, and never written.
    FailureNotTold,
    /// A VM is deleted only if the CR's status names it: one from before a crash is leaked.
    NotInStatusNotDeleted,
    /// A late `running` is written whatever the row says by now.
    UnguardedStatus,
    /// A VM that somebody deleted is made again: nobody remembers that there was one.
    MadeAgain,
    /// While the database is away, nothing is ended at its deadline.
    WaitsForTheDatabase,
    /// Whatever database is there is taken for the right one.
    NoBrake,
    /// A status is written over whatever another leader has recorded meanwhile.
    StatusOverAnyVersion,
    /// A person's pause of a desktop is not heeded.
    PauseNotHeeded,
    /// New desktops are made though an administrator has them wait.
    NeverWaits,
    /// The Secret of a desktop that ends is left behind.
    SecretLeft,
    /// With the Secret of a desktop that ends go those of all others.
    SecretsOfAll,
    /// A Secret that came when its desktop was over is there for good.
    NeverSweeps,
    /// Whoever has a term writes to the database, though the Lease may be another's by now.
    WritesWithoutTheLease,
}

impl Bug {
    pub(crate) const ALL: [Self; 14] = [
        Self::TimeoutNotTold,
        Self::FailureNotTold,
        Self::NotInStatusNotDeleted,
        Self::UnguardedStatus,
        Self::MadeAgain,
        Self::WaitsForTheDatabase,
        Self::NoBrake,
        Self::StatusOverAnyVersion,
        Self::PauseNotHeeded,
        Self::NeverWaits,
        Self::SecretLeft,
        Self::SecretsOfAll,
        Self::NeverSweeps,
        Self::WritesWithoutTheLease,
    ];
}

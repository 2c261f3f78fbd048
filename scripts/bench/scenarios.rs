//! What is measured: shapes of caches, each behind one kind of network.

use crate::server::Network;
use crate::tools::{Kind, Operation};

use Operation::{ColdExport, ColdImport, Served, WarmExport, WarmImport};

/// One shape of a cache behind one kind of network.
pub struct Scenario {
    pub name: &'static str,
    pub layers: usize,
    /// Bytes of each layer.
    pub size: u64,
    pub network: Network,
    pub operations: &'static [Operation],
    /// What is measured beside layercache as it is and its peers.
    pub variants: &'static [Kind],
    /// The cache is already on both sides.
    pub filled: bool,
    /// Compared with a single stream. Peers run once, because they are not part of that comparison.
    pub single: bool,
    pub when: When,
}

#[derive(PartialEq)]
pub enum When {
    Always,
    NotQuick,
    Full,
}

const MIB: u64 = 1 << 20;
const ALL: &[Operation] = &[ColdExport, WarmExport, ColdImport, WarmImport];
const COLD: &[Operation] = &[ColdExport, ColdImport];

pub const BIG: &str = "8 × 128 MiB, loopback";
pub const BIG_TLS: &str = "8 × 128 MiB, loopback, TLS";
pub const BIG_DISTANT: &str = "8 × 128 MiB, 20 ms a request, 90 MiB/s a connection";
pub const BIG_DISTANT_TLS: &str = "8 × 128 MiB, 20 ms a request, 90 MiB/s a connection, TLS";
pub const SMALL_DISTANT: &str = "500 × 200 KiB, 20 ms a request";
pub const HUGE: &str = "1 × 2 GiB, 20 ms a request, 90 MiB/s a connection";

const fn network(delay_ms: u64, rate_mib: u64, tls: bool) -> Network {
    Network {
        delay_ms,
        rate_mib,
        tls,
    }
}

/// Loopback as it is.
pub const NEAR: Network = network(0, 0, false);

const fn big(name: &'static str, network: Network, when: When) -> Scenario {
    Scenario {
        name,
        layers: 8,
        size: 128 * MIB,
        network,
        operations: COLD,
        variants: &[],
        filled: false,
        single: false,
        when,
    }
}

const fn small(name: &'static str, network: Network, when: When) -> Scenario {
    Scenario {
        name,
        layers: 500,
        size: 200 << 10,
        network,
        operations: ALL,
        variants: &[Kind::LayercacheWide],
        filled: false,
        single: false,
        when,
    }
}

const fn huge(name: &'static str, network: Network, when: When) -> Scenario {
    Scenario {
        layers: 1,
        size: 2048 * MIB,
        ..big(name, network, when)
    }
}

const fn many(name: &'static str, network: Network, when: When) -> Scenario {
    Scenario {
        layers: 5000,
        size: 1 << 10,
        operations: &[WarmExport, WarmImport],
        variants: &[],
        filled: true,
        ..small(name, network, when)
    }
}

/// In the order in which they run.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        operations: &[ColdExport, WarmExport, ColdImport, WarmImport, Served],
        ..big(BIG, NEAR, When::Always)
    },
    Scenario {
        variants: &[Kind::LayercacheSmall],
        ..big(BIG_DISTANT_TLS, network(20, 90, true), When::Always)
    },
    small(SMALL_DISTANT, network(20, 0, false), When::Always),
    Scenario {
        operations: &[ColdExport, ColdImport, Served],
        single: true,
        ..huge(HUGE, network(20, 90, false), When::Always)
    },
    many(
        "5,000 × 1 KiB already there, 20 ms a request",
        network(20, 0, false),
        When::Always,
    ),
    big(BIG_TLS, network(0, 0, true), When::NotQuick),
    Scenario {
        variants: &[Kind::LayercacheSmall],
        ..big(BIG_DISTANT, network(20, 90, false), When::NotQuick)
    },
    small("500 × 200 KiB, loopback", NEAR, When::NotQuick),
    big(
        "8 × 128 MiB, 2 ms a request, 90 MiB/s a connection, TLS",
        network(2, 90, true),
        When::NotQuick,
    ),
    small(
        "500 × 200 KiB, 20 ms a request, TLS",
        network(20, 0, true),
        When::NotQuick,
    ),
    small(
        "500 × 200 KiB, 2 ms a request, TLS",
        network(2, 0, true),
        When::Full,
    ),
    huge("1 × 2 GiB, loopback", NEAR, When::Full),
    many("5,000 × 1 KiB already there, loopback", NEAR, When::Full),
];

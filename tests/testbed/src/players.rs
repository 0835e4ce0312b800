//! Who plays KubeVirt: the simulator, for speed and scale, or the real pair, for truth. The node under both is the
//! same one.

use anyhow::{Context as _, Result};
use clap::ValueEnum;

use crate::assets::kubevirt::Release;
use crate::control_plane::{ControlPlane, install};
use crate::node::{Node, NodeConfig};
use crate::progress::Part;
use crate::real::Real;
use crate::scratch::Scratch;
use crate::simulator::{Simulator, SimulatorConfig, schema};

/// Chooses the player where a command has no option for it: `simulated` (the default), `real` or `none`.
pub const PLAYER: &str = "CYBERDESK_TESTBED_KUBEVIRT";
/// Chooses the release of the real one; without it the newest known.
pub const RELEASE: &str = "CYBERDESK_TESTBED_KUBEVIRT_VERSION";

/// Who plays KubeVirt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum KubeVirt {
    /// The simulator of this repository.
    Simulated,
    /// The real virt-api and virt-controller, built once with Go; only the node is played.
    Real,
    /// Nobody: virtual machines are objects that nothing happens to.
    None,
}

impl KubeVirt {
    /// The one that the environment asks for.
    pub fn wanted() -> Result<Self> {
        match std::env::var(PLAYER) {
            Ok(name) if !name.is_empty() => {
                let known = "expected simulated, real or none";
                Self::from_str(&name, false).map_err(|_| anyhow::anyhow!("{PLAYER}={name}: {known}"))
            }
            _ => Ok(Self::Simulated),
        }
    }
}

/// Reads [`RELEASE`].
pub fn release() -> Result<Release> {
    match std::env::var(RELEASE) {
        Ok(version) if !version.is_empty() => version.parse().context(RELEASE),
        _ => Ok(Release::default()),
    }
}

/// Whoever plays KubeVirt, at work. Dropping it ends both parts.
pub struct Players {
    _maker: Maker,
    _node: Option<Node>,
}

/// What stands where virt-api and virt-controller do.
enum Maker {
    Simulator(#[expect(dead_code, reason = "held until it is dropped")] Simulator),
    Real(Box<Real>),
    Nobody,
}

impl Players {
    /// Starts the one asked for and the node under it. The simulator's settings are not for the real one.
    pub async fn start(
        who: KubeVirt,
        control_plane: &ControlPlane,
        scratch: &Scratch,
        (simulator, node): (SimulatorConfig, NodeConfig),
        part: &Part,
    ) -> Result<Self> {
        let client = control_plane.client().await?;
        let maker = match who {
            KubeVirt::Simulated => {
                part.step("starting the simulator and the played node");
                let started = Simulator::start(client.clone(), simulator).await;
                Maker::Simulator(started.context("start the KubeVirt simulator")?)
            }
            KubeVirt::Real => {
                let started = Real::start(control_plane, scratch, release()?, part).await;
                Maker::Real(Box::new(started.context("start the real KubeVirt")?))
            }
            KubeVirt::None => {
                install(&client, &schema::definitions()?).await?;
                return Ok(Self { _maker: Maker::Nobody, _node: None });
            }
        };
        let node = Node::start(client, node).await.context("start the played node")?;
        part.done(&maker.words());
        Ok(Self { _maker: maker, _node: Some(node) })
    }
}

impl Maker {
    fn words(&self) -> String {
        match self {
            Self::Simulator(_) => "the simulator, on a played node".to_owned(),
            Self::Real(real) => {
                format!("KubeVirt {}: virt-api and virt-controller, on a played node", real.release().version)
            }
            Self::Nobody => "nobody".to_owned(),
        }
    }
}

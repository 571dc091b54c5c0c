//! Which devices a model, or several of it, live on: the knobs of ranks, stages, replicas, roles and nodes, checked against
//! each other.

use bcg_models::OptionError;
use bcg_models::weights::{Experts, MoeA2a};
use bcg_runtime::RANKS_MAX;

use super::{DeviceChoice, EngineOptions, refuse};
use crate::roles::RoleName;

/// The most replicas of one process.
const REPLICAS_MAX: usize = 16;

/// The most devices of a model: ranks times stages.
const DEVICES_MAX: usize = 16;

impl EngineOptions {
    pub(super) fn check_devices(&self) -> Result<(), OptionError> {
        self.check_ranks()?;
        self.check_replicas()?;
        self.check_experts()?;
        self.check_roles()
    }

    fn check_ranks(&self) -> Result<(), OptionError> {
        OptionError::positive("tp", self.tp)?;
        if self.tp > RANKS_MAX {
            let problem = format!("a model is not divided among {} ranks", self.tp);
            return Err(OptionError::new("tp", problem, "give at most 8"));
        }
        self.check_nodes()?;
        self.check_stages()?;
        let Some(devices) = &self.devices else { return Ok(()) };
        if self.device == DeviceChoice::Host {
            let remedy = "drop it: on the host device each rank has one of its own";
            return Err(OptionError::new("devices", "names GPUs, and `device` is host", remedy));
        }
        if devices.len() != self.num_devices() {
            let problem = match (self.dp, self.nnodes) {
                (1, 1) if self.pp > 1 => {
                    format!("has {} numbers for `pp` {} times `tp` {} ranks", devices.len(), self.pp, self.tp)
                }
                (1, 1) => format!("has {} numbers for the {} ranks of `tp`", devices.len(), self.tp),
                (1, _) => {
                    let ranks = self.num_local_ranks();
                    format!("has {} numbers for the {ranks} ranks of `tp` on each of `nnodes`", devices.len())
                }
                (dp, _) => {
                    let ranks = self.num_local_ranks();
                    format!("has {} numbers for `dp` {dp} times {ranks} ranks", devices.len())
                }
            };
            let remedy = "give the number of a GPU for each rank; one may stand there several times";
            return Err(OptionError::new("devices", problem, remedy));
        }
        Ok(())
    }

    /// The ranks of all stages of a replica that live in this process.
    pub(crate) fn num_local_ranks(&self) -> usize {
        (self.tp / self.nnodes).saturating_mul(self.pp)
    }

    fn check_nodes(&self) -> Result<(), OptionError> {
        OptionError::positive("nnodes", self.nnodes)?;
        if self.node_rank >= self.nnodes {
            let problem = format!("{} is none of the {} of `nnodes`", self.node_rank, self.nnodes);
            return Err(OptionError::new("node_rank", problem, "give a number from 0 to one less than `nnodes`"));
        }
        match (&self.dist_init_addr, self.nnodes) {
            (None, 1) => Ok(()),
            (Some(_), 1) => {
                Err(OptionError::new("dist_init_addr", "there is no other node", "add `nnodes` or drop it"))
            }
            (None, _) => {
                let problem = "is needed where `nnodes` is more than 1";
                Err(OptionError::new("dist_init_addr", problem, "give HOST:PORT at which node 0 can listen"))
            }
            (Some(address), _) if address.ends_with(":0") => {
                let problem = format!("{address} is no port at which other nodes find node 0");
                Err(OptionError::new("dist_init_addr", problem, "give the same port to all nodes"))
            }
            (Some(_), _) if self.dp > 1 => {
                let problem = "replicas do not span several processes";
                Err(OptionError::new("nnodes", problem, "drop `dp`, and put a gateway before several servers"))
            }
            (Some(_), _) if self.moe_a2a_backend == MoeA2a::Push => {
                let problem = "ranks of another process cannot be pushed rows";
                Err(OptionError::new("moe_a2a_backend", problem, "give `break`, or drop it"))
            }
            (Some(_), nodes) if !self.tp.is_multiple_of(nodes) => {
                let problem = format!("the {} ranks of `tp` cannot be divided among {nodes} nodes", self.tp);
                Err(OptionError::new("nnodes", problem, "give a divisor of `tp`"))
            }
            (Some(_), _) => Ok(()),
        }
    }

    /// Refuses a node that only follows, for what decides what runs.
    ///
    /// # Errors
    /// [`OptionError`] names `node_rank`.
    pub(crate) fn check_first_node(&self) -> Result<(), OptionError> {
        if self.node_rank == 0 {
            return Ok(());
        }
        let problem = format!("{}, where only the server follows node 0", self.node_rank);
        Err(OptionError::new("node_rank", problem, "start the server there with these options"))
    }

    /// Devices of all ranks of all replicas in this process.
    pub(crate) fn num_devices(&self) -> usize {
        self.dp.saturating_mul(self.num_local_ranks())
    }

    fn check_replicas(&self) -> Result<(), OptionError> {
        OptionError::positive("dp", self.dp)?;
        if self.dp > REPLICAS_MAX {
            let problem = format!("one process does not hold {} replicas", self.dp);
            let remedy = "give at most 16, or put a gateway before several processes";
            return Err(OptionError::new("dp", problem, remedy));
        }
        let devices = self.devices.as_deref().unwrap_or_default();
        let replicas: Vec<&[usize]> = devices.chunks(self.num_local_ranks()).collect();
        let is_shared = |(at, replica): (usize, &&[usize])| {
            replicas[at + 1..].iter().any(|other| other.iter().any(|device| replica.contains(device)))
        };
        if !replicas.iter().enumerate().any(is_shared) {
            return Ok(());
        }
        if self.tp > 1 {
            let problem = "several replicas share a GPU, where the ranks of one would wait for those of another";
            return Err(OptionError::new("devices", problem, "give each replica GPUs of its own, or `tp` 1"));
        }
        if self.kv_cache_tokens.is_none() {
            let problem = "several replicas share a GPU, whose memory is not divided among them";
            return Err(OptionError::new("devices", problem, "give `kv_cache_tokens`, for each of them"));
        }
        Ok(())
    }

    /// Refuses several replicas, for what runs one engine or one model.
    ///
    /// # Errors
    /// [`OptionError`] names `dp`.
    pub(crate) fn check_only_replica(&self) -> Result<(), OptionError> {
        if self.dp == 1 {
            return Ok(());
        }
        Err(OptionError::new("dp", format!("{} replicas, where one model is run alone", self.dp), "drop it"))
    }

    /// How several ranks divide the experts.
    pub(crate) fn experts(&self) -> Experts {
        if self.ep > 1 { Experts::Whole(self.moe_a2a_backend) } else { Experts::ByChannels }
    }

    fn check_experts(&self) -> Result<(), OptionError> {
        OptionError::positive("ep", self.ep)?;
        if self.ep == 1 && self.moe_a2a_backend != MoeA2a::None {
            let problem = "no rank has experts of its own";
            return Err(OptionError::new("moe_a2a_backend", problem, "add `ep` or drop it"));
        }
        if self.ep == 1 || self.ep == self.tp {
            return Ok(());
        }
        let problem = format!("is {}, and `tp` is {}: every rank has as many experts", self.ep, self.tp);
        Err(OptionError::new("ep", problem, "give the same number to both, or `ep` 1"))
    }

    /// The stages of a pipeline; that there are as many layers is checked when the model is loaded.
    fn check_stages(&self) -> Result<(), OptionError> {
        OptionError::positive("pp", self.pp)?;
        if self.pp > 1 && self.nnodes > 1 {
            let problem = "the stages of a pipeline do not span several processes";
            return Err(OptionError::new("pp", problem, "drop it or `nnodes`"));
        }
        if self.num_local_ranks() > DEVICES_MAX {
            let problem = format!("{} stages of {} ranks are too many devices", self.pp, self.tp);
            return Err(OptionError::new("pp", problem, "give at most 16 devices, `tp` times `pp`"));
        }
        Ok(())
    }

    /// The GPUs of the prefill role and of the decode role; `None` if one engine does both.
    pub(crate) fn role_gpus(&self) -> Option<[usize; 2]> {
        let gpu = |role| self.disaggregation.iter().find(|device| device.role == role).map(|device| device.gpu);
        Some([gpu(RoleName::Prefill)?, gpu(RoleName::Decode)?])
    }

    fn check_roles(&self) -> Result<(), OptionError> {
        if self.disaggregation.is_empty() {
            return Ok(());
        }
        if self.disaggregation.len() != 2 || self.role_gpus().is_none() {
            let given: Vec<String> = self.disaggregation.iter().map(ToString::to_string).collect();
            let problem = format!("`{}` does not name one GPU for each of two roles", given.join(","));
            return Err(OptionError::new("disaggregation", problem, "give prefill:0,decode:1, or other GPUs"));
        }
        let others = [
            ("tp", self.tp != 1),
            ("pp", self.pp != 1),
            ("dp", self.dp != 1),
            ("ep", self.ep != 1),
            ("nnodes", self.nnodes != 1),
            ("devices", self.devices.is_some()),
        ];
        let problem = "is not built together with `disaggregation`, where each role has one GPU that it names";
        refuse(true, &others, problem, "drop one of the two options")
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::refused;
    use super::*;

    #[test]
    fn each_rank_has_a_device() {
        for (tp, devices) in [(1, None), (8, None), (2, Some(vec![0, 0])), (2, Some(vec![3, 1])), (1, Some(vec![7]))] {
            let options = EngineOptions { tp, devices, ..EngineOptions::new("m") };
            options.check().expect("these work");
        }
        refused(|options| options.tp = 0, "tp", "at least 1");
        refused(|options| options.tp = 9, "tp", "at most 8");
        refused(|options| options.pp = 0, "pp", "at least 1");
        refused(|options| (options.tp, options.pp) = (8, 3), "pp", "at most 16 devices");
        refused(|options| (options.pp, options.devices) = (2, Some(vec![0])), "devices", "for each rank");
        refused(|options| options.devices = Some(vec![0, 1]), "devices", "for each rank");
        refused(|options| (options.tp, options.devices) = (3, Some(vec![0, 1])), "devices", "for each rank");
        refused(|options| (options.tp, options.devices) = (2, Some(Vec::new())), "devices", "for each rank");
        let on_host = |options: &mut EngineOptions| {
            (options.device, options.tp, options.devices) = (DeviceChoice::Host, 2, Some(vec![0, 1]));
        };
        refused(on_host, "devices", "drop it");
    }

    #[test]
    fn each_node_has_as_many_ranks_and_knows_where_to_meet() {
        let nodes = |tp, nnodes, node_rank, at: Option<&str>| {
            let dist_init_addr = at.map(str::to_owned);
            move |options: &mut EngineOptions| {
                (options.tp, options.nnodes, options.node_rank) = (tp, nnodes, node_rank);
                options.dist_init_addr.clone_from(&dist_init_addr);
            }
        };
        let mut options = EngineOptions::new("m");
        nodes(8, 2, 1, Some("host:1"))(&mut options);
        options.devices = Some(vec![0, 1, 2, 3]);
        options.check().expect("these work");
        assert_eq!(options.num_local_ranks(), 4);
        options.devices = Some(vec![0, 1]);
        assert!(options.check().expect_err("too few").to_string().contains("the 4 ranks of `tp` on each of `nnodes`"));
        refused(nodes(2, 0, 0, None), "nnodes", "at least 1");
        refused(nodes(2, 2, 2, Some("host:1")), "node_rank", "one less than `nnodes`");
        refused(nodes(2, 2, 0, Some("host:0")), "dist_init_addr", "the same port");
        refused(nodes(2, 2, 0, None), "dist_init_addr", "HOST:PORT");
        refused(nodes(2, 1, 0, Some("host:1")), "dist_init_addr", "drop it");
        refused(nodes(3, 2, 0, Some("host:1")), "nnodes", "a divisor of `tp`");
        let pushed = |options: &mut EngineOptions| {
            nodes(2, 2, 0, Some("host:1"))(options);
            (options.ep, options.moe_a2a_backend) = (2, MoeA2a::Push);
        };
        refused(pushed, "moe_a2a_backend", "give `break`");
    }

    #[test]
    fn each_replica_has_devices_of_its_own() {
        for (dp, tp, devices) in [(2, 1, None), (2, 2, Some(vec![0, 1, 2, 3])), (1, 2, Some(vec![0, 0]))] {
            let options = EngineOptions { dp, tp, devices, ..EngineOptions::new("m") };
            options.check().expect("these work");
        }
        refused(|options| options.dp = 0, "dp", "at least 1");
        refused(|options| options.dp = 17, "dp", "gateway");
        let devices = |dp, tp, devices: &[usize]| {
            let devices = Some(devices.to_vec());
            move |options: &mut EngineOptions| (options.dp, options.tp, options.devices) = (dp, tp, devices)
        };
        refused(devices(2, 1, &[0]), "devices", "for each rank");
        refused(devices(2, 2, &[0, 1]), "devices", "for each rank");
        refused(devices(2, 2, &[0, 1, 1, 2]), "devices", "GPUs of its own");
        refused(devices(3, 1, &[0, 1, 0]), "devices", "give `kv_cache_tokens`");
        let shared = EngineOptions { dp: 2, kv_cache_tokens: Some(4096), ..EngineOptions::new("m") };
        let shared = EngineOptions { devices: Some(vec![0, 0]), ..shared };
        shared.check().expect("each has its part");
        shared.check_only_replica().expect_err("there are two");
    }
}

//! Rules of worlds of several ranks, on host devices: what ranks compute together, in which order, and how they end.
//!
//! Ranks are driven as programs drive them: by [`bcg_runtime::RankThreads`], with runners that hold a communicator.

mod bits;
mod faults;
mod fixture;
mod graphs;
mod loss;
mod programs;
mod replays;

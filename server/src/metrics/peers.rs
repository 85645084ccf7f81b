//! What is read at each scrape of other machines: who is there, and what passed between them and this one.

use std::fmt::Error;

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::Unit,
};
use serde_json::Value;

use crate::slots::Slots;

/// The machines of the mesh.
#[derive(Debug)]
pub(super) struct Peers(pub Slots);

impl Peers {
    /// A line for each machine that is known.
    fn rows(&self) -> Vec<(String, Value)> {
        let statuses = self.0.remote().sources().iter().map(|source| source.status());
        let nodes = statuses.flat_map(|mut status| match status["nodes"].take() {
            Value::Array(nodes) => nodes,
            _ => Vec::new(),
        });
        nodes.filter_map(|node| Some((node["name"].as_str()?.to_owned(), node))).collect()
    }
}

impl Collector for Peers {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let rows = self.rows();
        if rows.is_empty() {
            return Ok(());
        }
        let help = "1 for a machine that requests may go to, 0 for one that was lost";
        let mut family = encoder.encode_descriptor("mesh_node_up", help, None, MetricType::Gauge)?;
        for (name, row) in &rows {
            let up = i64::from(row["routable"] == Value::Bool(true));
            ConstGauge::new(up).encode(family.encode_family(&[("node", name)])?)?;
        }
        let help = "The time to a machine and back";
        let unit = Some(&Unit::Seconds);
        let mut family = encoder.encode_descriptor("mesh_round_trip", help, unit, MetricType::Gauge)?;
        for (name, row) in &rows {
            if let Some(trip) = row["round_trip_ms"].as_f64() {
                ConstGauge::new(trip / 1e3).encode(family.encode_family(&[("node", name)])?)?;
            }
        }
        for (key, metric, help) in [
            ("sent", "mesh_requests_sent", "Requests that went to a machine"),
            ("failed", "mesh_requests_failed", "Of those, how many it did not answer whole"),
            (
                "failed_over",
                "mesh_requests_failed_over",
                "Of those, how many came to it because another machine had failed",
            ),
            ("served", "mesh_requests_served", "Requests of a machine that were answered here"),
        ] {
            let mut family = encoder.encode_descriptor(metric, help, None, MetricType::Counter)?;
            for (name, row) in &rows {
                let count = ConstCounter::new(row[key].as_u64().unwrap_or_default());
                count.encode(family.encode_family(&[("node", name)])?)?;
            }
        }
        Ok(())
    }
}

//! How each cost grows with the fleet, drawn for people: one small chart for each, both axes by powers of ten.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::coord::combinators::IntoLogRange as _;
use plotters::prelude::*;

use crate::fleet::Costs;

type Cost = fn(&Costs) -> f64;

/// Draws all that was measured into an SVG file.
pub(crate) fn draw(file: &Path, costs: &[Costs]) -> Result<()> {
    let charts: [(&str, Cost); 6] = [
        ("start -> first new row served, ms", |costs| costs.first_served),
        ("start -> all verified, ms", |costs| costs.verified),
        ("a bare LIST of the same objects, ms", |costs| costs.list),
        ("memory, MB", |costs| costs.memory),
        ("lateness of deadlines, p99, ms", |costs| costs.lateness),
        ("idle, % of a core", |costs| costs.idle_cpu.max(0.01)),
    ];
    let area = SVGBackend::new(file, (800, 840)).into_drawing_area();
    area.fill(&WHITE)?;
    for (panel, (title, cost)) in area.split_evenly((3, 2)).iter().zip(charts) {
        chart(panel, title, &costs.iter().map(|costs| (costs.desktops as f64, cost(costs))).collect::<Vec<_>>())
            .map_err(|error| anyhow!("draw {title}: {error}"))?;
    }
    area.present().map_err(|error| anyhow!("write {}: {error}", file.display()))
}

fn chart(
    panel: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
    title: &str,
    points: &[(f64, f64)],
) -> Result<(), Box<dyn std::error::Error>> {
    let ends = |values: &mut dyn Iterator<Item = f64>| {
        values.fold((f64::MAX, f64::MIN), |(least, most), value| (least.min(value), most.max(value)))
    };
    let (least, most) = ends(&mut points.iter().map(|point| point.0));
    let (low, high) = ends(&mut points.iter().map(|point| point.1));
    let mut chart = ChartBuilder::on(panel)
        .caption(title, ("sans-serif", 15))
        .margin(12)
        .x_label_area_size(28)
        .y_label_area_size(52)
        .build_cartesian_2d((least * 0.8..most * 1.25).log_scale(), (low * 0.5..high * 2.0).log_scale())?;
    chart.configure_mesh().x_desc("desktops").light_line_style(WHITE).draw()?;
    chart.draw_series(LineSeries::new(points.iter().copied(), BLUE.stroke_width(2)))?;
    chart.draw_series(points.iter().map(|point| Circle::new(*point, 4, BLUE.filled())))?;
    Ok(())
}

//! What quantizing did to a model: numbers for programs, a page and a model card for people.

use std::fmt::Write as _;

use serde::Serialize;

use super::quantized_layer::{GroupReport, LayerReport, ModuleReport};
use crate::files::human_bytes;
use crate::plot::{self, Line, LinePlot, Scale, bars, escape, number};

const PAGE: &str = include_str!("report.html");

/// Roles in the order in which a layer computes them, and what the page calls them.
const ROLES: [(&str, &str); 4] = [
    ("qkv", "query, key, value"),
    ("o", "attention output"),
    ("gate_up", "gate, up"),
    ("down", "down"),
];

/// All that is known of a finished run. Errors are relative: see [`ModuleReport`].
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct QuantizationReport {
    /// Name and version.
    pub program: String,
    pub model: String,
    /// `awq` or `awq+`.
    pub method: String,
    pub group_size: String,
    pub symmetric: bool,
    pub calibration: CalibrationReport,
    /// Patterns of modules that were to stay as they are.
    pub skip: Vec<String>,
    pub max_bits_per_weight: Option<f64>,
    /// Average over the weights of all linears in the layers.
    pub bits_per_weight: f64,
    /// Modules whose weights have 16 bits.
    pub modules_not_converted: Vec<String>,
    pub bytes: SizeReport,
    pub error: ErrorReport,
    pub perplexity: Option<PerplexityReport>,
    /// Why there is no perplexity.
    pub perplexity_note: Option<String>,
    /// Layers that an earlier run had finished.
    pub num_layers_resumed: usize,
    /// Of this run.
    pub seconds: f64,
    pub layers: Vec<LayerReport>,
}

/// The text that activations come from.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CalibrationReport {
    pub text: String,
    pub num_tokens: usize,
    pub num_samples: usize,
    pub sample_len: usize,
}

/// Bytes of all tensors.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct SizeReport {
    pub before: u64,
    pub after: u64,
}

/// Averages over the quantized modules.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct ErrorReport {
    /// Of rounding to nearest.
    pub rtn: f64,
    /// With factors and clipping, rounded to nearest.
    pub awq: f64,
    /// Of what was written.
    pub written: f64,
}

/// How well the model predicts a text that it was not calibrated on, with float activations.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PerplexityReport {
    pub text: String,
    /// Tokens of a chunk.
    pub ctx: usize,
    pub tokens_scored: usize,
    pub before: f64,
    pub after: f64,
}

impl ErrorReport {
    pub fn of(layers: &[LayerReport]) -> ErrorReport {
        let quantized: Vec<&ModuleReport> = layers
            .iter()
            .flat_map(|layer| &layer.groups)
            .flat_map(|group| &group.modules)
            .filter(|module| !module.is_skipped)
            .collect();
        let mean = |error: fn(&ModuleReport) -> f64| {
            let sum: f64 = quantized.iter().map(|module| error(module)).sum();
            sum / quantized.len().max(1) as f64
        };
        ErrorReport {
            rtn: mean(|module| module.error_rtn),
            awq: mean(|module| module.error_awq),
            written: mean(|module| module.error),
        }
    }
}

impl QuantizationReport {
    /// The content of `quantization.json`.
    pub fn json(&self) -> String {
        // Maps with string keys and finite numbers alone: nothing that JSON could not say.
        format!("{:#}\n", serde_json::json!(self))
    }

    /// A page that stands alone: no script, no other file.
    pub fn page(&self) -> String {
        let mut page = String::with_capacity(PAGE.len() + (64 << 10));
        let mut rest = PAGE;
        while let Some((before, after)) = rest.split_once("{{") {
            page.push_str(before);
            let Some((name, after)) = after.split_once("}}") else { break };
            page.push_str(&self.part(name));
            rest = after;
        }
        page.push_str(rest);
        page
    }

    /// What stands for `{{name}}` in the page.
    fn part(&self, name: &str) -> String {
        match name {
            "style" => plot::STYLE.to_owned(),
            "model" => escape(&self.model),
            "program" => escape(&self.program),
            "facts" => self.facts(),
            "perplexity" => self.perplexity_plot(),
            "errors" => self.plots(error_plot),
            "factors" => self.plots(factor_plot),
            "clipping" => self.clipping_plot(),
            "rows" => self.rows(),
            _ => String::new(),
        }
    }

    fn facts(&self) -> String {
        let mut html = String::new();
        for (name, value) in self.fact_list() {
            let _ = writeln!(html, "<dt>{}</dt><dd>{}</dd>", escape(&name), escape(&value));
        }
        html
    }

    /// The numbers that the page and the model card tell, without times.
    fn fact_list(&self) -> Vec<(String, String)> {
        let CalibrationReport { text, num_samples, sample_len, .. } = &self.calibration;
        let zeros = if self.symmetric { "symmetric" } else { "with zeros" };
        let SizeReport { before, after } = self.bytes;
        let mut facts = vec![
            ("Method".into(), self.method.clone()),
            ("Weights".into(), format!("4 bits, group size {}, {zeros}", self.group_size)),
            (
                "Bits per weight".into(),
                format!("{:.3} in the linears of the layers", self.bits_per_weight),
            ),
            ("Size".into(), format!("{} → {}", human_bytes(before), human_bytes(after))),
            (
                "Calibration".into(),
                format!("{num_samples} samples of {sample_len} tokens from {text}"),
            ),
            (
                "Mean relative output error".into(),
                format!(
                    "{} rounded to nearest → {}",
                    number(self.error.rtn),
                    number(self.error.written)
                ),
            ),
        ];
        if let Some(PerplexityReport { text, ctx, before, after, .. }) = &self.perplexity {
            let value = format!("{before:.2} → {after:.2} on {text}, in chunks of {ctx} tokens");
            facts.push(("Perplexity".into(), value));
        }
        if let Some(note) = &self.perplexity_note {
            facts.push(("Perplexity".into(), format!("not measured: {note}")));
        }
        if !self.modules_not_converted.is_empty() {
            let value = format!("{} modules", self.modules_not_converted.len());
            facts.push(("Left in 16 bits".into(), value));
        }
        facts
    }

    fn perplexity_plot(&self) -> String {
        let Some(PerplexityReport { text, tokens_scored, before, after, .. }) = &self.perplexity
        else {
            return String::new();
        };
        let description = format!(
            "{before:.2} before and {after:.2} after quantizing, on {text}, {tokens_scored} tokens \
             scored. Lower is better."
        );
        let values = [("float", *before), (&self.method, *after)];
        figure(&bars("perplexity", "Perplexity", &description, &values))
    }

    /// One plot for each role that the model has.
    fn plots(&self, plot: fn(&str, &str, &[(usize, &GroupReport)]) -> LinePlot) -> String {
        let mut html = String::new();
        for (role, name) in ROLES {
            let groups = self.groups(role);
            if !groups.is_empty() {
                html.push_str(&figure(&plot(role, name, &groups).svg()));
            }
        }
        html
    }

    fn groups(&self, role: &str) -> Vec<(usize, &GroupReport)> {
        self.layers
            .iter()
            .flat_map(|layer| layer.groups.iter().map(|group| (layer.layer_idx, group)))
            .filter(|(_, group)| group.role == role)
            .collect()
    }

    fn clipping_plot(&self) -> String {
        let lines = ROLES.map(|(role, _)| Line {
            name: role.replace('_', ", "),
            points: over_layers(&self.groups(role), |module| module.clipped * 100.0),
        });
        let plot = LinePlot {
            id: "clipping".to_owned(),
            title: "Groups that are clipped, in percent".to_owned(),
            description: "Share of the groups of weights whose largest weights are cut off, for \
                          each layer and role."
                .to_owned(),
            unit: " %",
            scale: Scale::Linear,
            x_name: "layer",
            x_scale: Scale::Linear,
            bands: Vec::new(),
            lines: lines.into(),
        };
        figure(&plot.svg())
    }

    /// The rows of the table: what the plots show, in numbers.
    fn rows(&self) -> String {
        let mut html = String::new();
        for layer in &self.layers {
            for group in &layer.groups {
                for module in &group.modules {
                    write_row(&mut html, layer, group, module);
                }
            }
        }
        html
    }

    /// The model card; `original` is the card of the model that was quantized.
    pub fn card(&self, original: Option<&str>) -> String {
        let (front, original) = match original {
            Some(text) => split_front_matter(text),
            None => ("", ""),
        };
        let model = one_line(&self.model);
        let mut card = format!(
            "{front}# {model} in 4 bits\n\n\
             {model}, quantized by {} with activation-aware scales (AWQ \"gemm\" format).\n\n\
             | | |\n|---|---|\n",
            self.program
        );
        for (name, value) in self.fact_list() {
            let _ = writeln!(card, "| {name} | {} |", one_line(&value).replace('|', "\\|"));
        }
        card.push_str(
            "\nErrors are ‖x·Wᵀ − x·Ŵᵀ‖² / ‖x·Wᵀ‖² over the calibration rows; perplexities are \
             measured with float activations.\n\
             `quantization.html` and `quantization.json` have every layer.\n\n\
             ```sh\nbespoke generate --model . --prompt 'Once upon a time'\nvllm serve .\n```\n",
        );
        if !original.trim().is_empty() {
            let _ = write!(
                card,
                "\n---\n\nThe original model's card follows.\n\n{}\n",
                original.trim()
            );
        }
        card
    }
}

fn error_plot(role: &str, name: &str, groups: &[(usize, &GroupReport)]) -> LinePlot {
    let line = |name: &str, error: fn(&ModuleReport) -> f64| Line {
        name: name.to_owned(),
        points: over_layers(groups, error),
    };
    LinePlot {
        id: format!("error-{role}"),
        title: format!("Output error: {name}"),
        description: "Relative squared error of the outputs over the layers, on a logarithmic \
                      axis: of rounding to nearest, with factors and clipping, and of what was \
                      written. Lower is better."
            .to_owned(),
        unit: "",
        scale: Scale::Log,
        x_name: "layer",
        x_scale: Scale::Linear,
        bands: Vec::new(),
        lines: vec![
            line("nearest", |module| module.error_rtn),
            line("scaled, clipped", |module| module.error_awq),
            line("written", |module| module.error),
        ],
    }
}

fn factor_plot(role: &str, name: &str, groups: &[(usize, &GroupReport)]) -> LinePlot {
    let line = |name: &str, idx: usize| Line {
        name: name.to_owned(),
        points: groups.iter().map(|(l, group)| (*l, f64::from(group.factors[idx]))).collect(),
    };
    LinePlot {
        id: format!("factors-{role}"),
        title: format!("Factors on the inputs: {name}"),
        description: "Largest, median and smallest factor on the inputs over the layers, on a \
                      logarithmic axis."
            .to_owned(),
        unit: "",
        scale: Scale::Log,
        x_name: "layer",
        x_scale: Scale::Linear,
        bands: Vec::new(),
        lines: vec![line("largest", 2), line("median", 1), line("smallest", 0)],
    }
}

/// The mean over the quantized modules of each group.
fn over_layers(
    groups: &[(usize, &GroupReport)],
    value: impl Fn(&ModuleReport) -> f64,
) -> Vec<(usize, f64)> {
    let mut points = Vec::new();
    for (layer_idx, group) in groups {
        let values: Vec<f64> =
            group.modules.iter().filter(|module| !module.is_skipped).map(&value).collect();
        if !values.is_empty() {
            points.push((*layer_idx, values.iter().sum::<f64>() / values.len() as f64));
        }
    }
    points
}

fn write_row(html: &mut String, layer: &LayerReport, group: &GroupReport, module: &ModuleReport) {
    let _ = write!(
        html,
        "<tr><th scope=\"row\">{}</th><td>{}</td>",
        layer.layer_idx,
        escape(short_name(&module.name)),
    );
    if module.is_skipped {
        html.push_str("<td colspan=\"7\">16 bits</td></tr>\n");
        return;
    }
    let [min, median, max] = group.factors.map(f64::from);
    for value in [module.error_rtn, module.error_awq, module.error] {
        let _ = write!(html, "<td>{}</td>", number(value));
    }
    let _ = writeln!(
        html,
        "<td>{} · {} · {}</td><td>{}</td><td>{}</td><td>{:.1} %</td></tr>",
        number(min),
        number(median),
        number(max),
        number(f64::from(group.alpha)),
        number(f64::from(group.beta)),
        module.clipped * 100.0,
    );
}

/// `model.layers.3.mlp.up_proj` → `mlp.up_proj`.
fn short_name(module: &str) -> &str {
    module.splitn(4, '.').nth(3).unwrap_or(module)
}

fn figure(svg: &str) -> String {
    format!("<figure>{svg}</figure>\n")
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A card's metadata between two lines `---`, and the rest.
fn split_front_matter(card: &str) -> (&str, &str) {
    let Some(metadata) = card.strip_prefix("---\n") else { return ("", card) };
    match metadata.find("\n---\n") {
        Some(end) => card.split_at("---\n".len() + end + "\n---\n".len()),
        None => ("", card),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> QuantizationReport {
        let module = |name: &str, is_skipped| ModuleReport {
            name: format!("model.layers.0.{name}"),
            num_weights: 64,
            error_rtn: 0.02,
            error_awq: 0.01,
            error: 0.005,
            clipped: 0.25,
            is_skipped,
        };
        let group = |role: &str, modules| GroupReport {
            role: role.to_owned(),
            alpha: 0.5,
            beta: 0.0,
            factors: [0.5, 1.0, 4.0],
            modules,
        };
        let groups = vec![
            group(
                "qkv",
                vec![module("self_attn.q_proj", false), module("self_attn.v_proj", false)],
            ),
            group("down", vec![module("mlp.down_proj", true)]),
        ];
        let layers = vec![LayerReport { layer_idx: 0, groups, seconds: 1.0 }];
        QuantizationReport {
            program: "bespoke 0".to_owned(),
            model: "<tiny> & small".to_owned(),
            method: "awq".to_owned(),
            group_size: "64".to_owned(),
            symmetric: false,
            calibration: CalibrationReport {
                text: "a | text".to_owned(),
                num_tokens: 100,
                num_samples: 2,
                sample_len: 16,
            },
            skip: vec!["down_proj".to_owned()],
            max_bits_per_weight: None,
            bits_per_weight: 6.5,
            modules_not_converted: vec!["model.layers.0.mlp.down_proj".to_owned()],
            bytes: SizeReport { before: 4000, after: 1000 },
            error: ErrorReport::of(&layers),
            perplexity: Some(PerplexityReport {
                text: "held-out chunks".to_owned(),
                ctx: 16,
                tokens_scored: 14,
                before: 17.6,
                after: 19.123,
            }),
            perplexity_note: None,
            num_layers_resumed: 0,
            seconds: 2.0,
            layers,
        }
    }

    #[test]
    fn errors_are_those_of_quantized_modules() {
        let error = report().error;
        assert_eq!((error.rtn, error.awq, error.written), (0.02, 0.01, 0.005));
        assert_eq!(ErrorReport::of(&[]).rtn, 0.0);
    }

    #[test]
    fn the_page_is_whole_and_stands_alone() {
        let page = report().page();
        assert!(page.starts_with("<!doctype html>") && page.ends_with("</html>\n"));
        assert!(!page.contains("{{") && !page.contains("<script"));
        assert!(!page.contains("http:") && !page.contains("https:") && !page.contains("url("));
        assert!(page.contains("&lt;tiny&gt; &amp; small") && !page.contains("<tiny>"));
        // Perplexity, clipping, and errors and factors of two roles.
        assert_eq!(page.matches("<svg role=\"img\"").count(), 6);
        assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
        assert_eq!(page.matches("<tr><th scope=\"row\">").count(), 3);
        assert!(page.contains("19.12") && page.contains("25.0 %") && page.contains("16 bits"));
        let ids: Vec<&str> =
            page.split(" id=\"").skip(1).filter_map(|rest| rest.split('"').next()).collect();
        let mut distinct = ids.clone();
        distinct.sort_unstable();
        distinct.dedup();
        assert_eq!(ids.len(), distinct.len(), "{ids:?}");
    }

    #[test]
    fn json_says_the_same() {
        let json: serde_json::Value = serde_json::from_str(&report().json()).unwrap();
        assert_eq!(json["perplexity"]["after"], 19.123);
        assert_eq!(json["layers"][0]["groups"][0]["modules"][1]["error_awq"], 0.01);
        assert_eq!(json["modules_not_converted"][0], "model.layers.0.mlp.down_proj");
    }

    #[test]
    fn cards_keep_what_the_original_says() {
        let card = report().card(Some("---\nlicense: mit\n---\n# Tiny\nA model.\n"));
        assert!(card.starts_with("---\nlicense: mit\n---\n# <tiny> & small in 4 bits\n"), "{card}");
        assert!(card.contains("| Perplexity | 17.60 → 19.12 on held-out chunks"), "{card}");
        assert!(card.contains("from a \\| text |") && card.contains("# Tiny\nA model."), "{card}");
        let alone = report().card(None);
        assert!(alone.starts_with("# <tiny>") && !alone.contains("follows"), "{alone}");
        assert!(report().card(Some("---\nno end")).contains("---\nno end"));
    }
}

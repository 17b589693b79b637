/**
 * A mixture of experts from a dense model ("upcycling"): every MLP becomes a routed layer that computes what
 * the MLP did, and has room to learn more.
 *
 * An MLP of width F is cut into G shards of F / G hidden units; expert e is shard e mod G, so that there are
 * E / G copies of the MLP. The router has a random row for every copy, repeated for its G shards, which are
 * thus chosen together. Up and down projections are scaled by s^(1/3) each: the squared ReLU between them
 * makes that s, which undoes the weights of the chosen.
 * Source: "Upcycling large language models into mixture of experts" (arXiv 2410.07524).
 */
import type { RouterScore } from "../ops/router.ts";
import { UsageError } from "../tensor/errors.ts";
import { sizeOf } from "../tensor/ndarray.ts";
import { fillNormal } from "../tensor/philox.ts";
import { listParameters, type Parameter } from "./checkpoint_names.ts";
import { layerSpecs, mtpSpecs, type NemotronHConfig, parseConfig, serialiseConfig } from "./config.ts";

export interface UpcycleOptions {
  /** Experts of a layer, E. */
  readonly experts: number;
  /** Shards that an MLP is cut into, G. */
  readonly granularity: number;
  /** Experts per token, K. With a multiple of G the first loss is that of the dense model. */
  readonly topk: number;
  /** What the router makes of its logits; softmax over all experts is not exact. Default: softmax_chosen. */
  readonly score?: RouterScore;
  /** Of the router's rows; default 0. */
  readonly seed?: number;
}

/**
 * The configuration of the upcycled model. Its weights are f32: scaled ones would lose digits in halves.
 * @throws UsageError for a model that is no dense one of MLPs of one width without biases, or sizes that do
 *   not divide; ConfigError for more experts per token than there are
 */
export function upcycledConfig(dense: NemotronHConfig, options: UpcycleOptions): NemotronHConfig {
  const { experts, granularity, topk, score = "softmax_chosen" } = options;
  const specs = [...layerSpecs(dense), ...mtpSpecs(dense)];
  const widths = new Set(specs.flatMap((spec) => (spec.kind === "mlp" ? [spec.intermediate_size] : [])));
  const [width] = widths;
  const refuse = (expected: string, found: string | number): never => {
    throw new UsageError(`To upcycle needs ${expected}, found ${found}.`);
  };
  if (specs.some(({ kind }) => kind === "moe")) refuse("a model without experts", "some");
  if (width === undefined) return refuse("a model with MLP layers", "none");
  if (widths.size > 1) refuse("MLP layers of one width", [...widths].join(" and "));
  if (dense.mlp_bias) refuse("MLP layers without biases, which routed experts have none of", "some");
  const divides = (divisor: number, n: number) => Number.isInteger(n / divisor) && divisor >= 1;
  if (!divides(granularity, width)) refuse(`a granularity that divides the width ${width}`, granularity);
  if (!divides(granularity, experts)) {
    refuse(`a number of experts that is a multiple of the granularity ${granularity}`, experts);
  }
  const routed = (pattern: string) => pattern.replaceAll("-", "E");
  const config: NemotronHConfig = {
    ...dense, hybrid_override_pattern: routed(dense.hybrid_override_pattern),
    mtp_hybrid_override_pattern: routed(dense.mtp_hybrid_override_pattern),
    block_configs: null, mtp_block_configs: null, intermediate_size: width, mtp_n_routed_experts: null,
    n_routed_experts: experts, num_experts_per_tok: topk, moe_intermediate_size: width / granularity,
    moe_latent_size: null, n_shared_experts: 0, moe_shared_expert_intermediate_size: 0,
    shared_expert_gate: false, n_group: 1, topk_group: 1, scoring_func: score, router_choice: "score",
    norm_topk_prob: score !== "softmax", routed_scaling_factor: 1, torch_dtype: "float32",
  };
  return parseConfig(serialiseConfig(config), { what: "upcycled model" });
}

/** What the weights of the chosen experts are undone by. */
function scaleOf({ experts, granularity, topk, score }: UpcycleOptions): number {
  return score === "softmax" ? experts * granularity / topk : granularity;
}

/**
 * The values of a parameter of the upcycled model.
 * @param config of the upcycled model
 * @param dense reads a parameter of the dense model by name
 */
export async function upcycledValues(
  config: NemotronHConfig, parameter: Parameter, dense: (name: string) => Promise<Float32Array>,
  options: UpcycleOptions,
): Promise<Float32Array> {
  const { name, kind, shape } = parameter;
  const { experts: E, granularity: G, seed = 0 } = options;
  if (kind === "router_bias") return new Float32Array(E);
  if (kind === "router") {
    const [, hidden] = shape as [number, number];
    const stream = listParameters(config).findIndex((one) => one.name === name);
    const rows = fillNormal({ seed, stream, step: 0 }, new Float32Array((E / G) * hidden));
    return Float32Array.from({ length: E * hidden }, (_, i) =>
      config.initializer_range * rows[Math.floor(i / hidden / G) * hidden + i % hidden]!);
  }
  if (kind !== "expert") return dense(name);
  const [, rows, cols] = shape as [number, number, number];
  const whole = await dense(`${name.replace(".experts.", ".")}.weight`);
  const factor = Math.cbrt(scaleOf(options));
  const values = new Float32Array(sizeOf(shape));
  const isUp = name.endsWith("up_proj");
  for (let e = 0; e < E; e++) {
    const shard = e % G;
    const first = e * rows * cols;
    for (let r = 0; r < rows; r++) {
      // The width is the rows of an up projection [F, D], and the columns of a down projection [D, F].
      const from = isUp ? (shard * rows + r) * cols : r * cols * G + shard * cols;
      for (let c = 0; c < cols; c++) values[first + r * cols + c] = factor * whole[from + c]!;
    }
  }
  return values;
}

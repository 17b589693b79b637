/**
 * AWQ: input channels that matter are made larger in the weights and smaller in the inputs before the weights
 * are rounded, where the model's function stays the same: s goes into the columns of a product, 1 / s into
 * what makes its inputs.
 *
 *   norm -> all products that read it, the router included · gated norm -> out_proj · v_proj -> o_proj
 *   up_proj -> down_proj (rows of up times s^-1/2, which the squared ReLU makes 1 / s) · fc1 -> experts
 *   experts' down_proj -> fc2 · the two norms of a prediction block -> eh_proj
 *
 * Source    Lin et al. 2023 (arXiv 2306.00978): s = x^a / w^(1 - a), a searched. Tested in
 * test/model/compress.test.ts.
 */
import { layerSpecs, type LayerSpec, mtpSpecs, type NemotronHConfig } from "../models/config.ts";
import { BLOCK, type TargetFormat } from "./encode.ts";
import type { InputStats } from "./calibrate.ts";

/** Something that makes input channels: a vector of factors, or the rows of a matrix with their biases. */
interface Producer {
  readonly name: string;
  /** Its channels are those from here on. */
  readonly first: number;
  readonly count: number;
  /** It is multiplied by s to this power. */
  readonly power: number;
}

/** A place where a scale for each channel can be moved from inputs to weights. */
export interface Fold {
  readonly producers: readonly Producer[];
  /** Checkpoint names of the weights [out, width] whose inputs these are. */
  readonly consumers: readonly string[];
  readonly width: number;
  /** Channel that channel i shares its scale with: keys and values of several query heads; null: itself. */
  readonly source: ((i: number) => number) | null;
}

/** All folds of a model, in the order of the forward pass. */
export function listFolds(config: NemotronHConfig): Fold[] {
  const { hidden_size: hidden } = config;
  const folds: Fold[] = [];
  const add = (
    producers: readonly [name: string, power: number, first?: number, count?: number][],
    consumers: readonly string[], width: number, source: Fold["source"] = null,
  ) => folds.push({
    producers: producers.map(([name, power, first = 0, count = width]) => ({ name, power, first, count })),
    consumers, width, source,
  });
  const mlp = (path: string, width: number) => add([
    [`${path}.up_proj.weight`, -0.5], [`${path}.up_proj.bias`, -0.5],
  ], [`${path}.down_proj.weight`], width);
  const layer = (spec: LayerSpec, at: string) => {
    const mixer = `${at}.mixer`;
    const reads = (names: readonly string[]) =>
      add([[`${at}.norm.weight`, -1]], names.map((name) => `${mixer}.${name}.weight`), hidden);
    switch (spec.kind) {
      case "mamba": {
        const inner = config.mamba_num_heads * config.mamba_head_dim;
        reads(["in_proj"]);
        add([[`${mixer}.norm.weight`, -1]], [`${mixer}.out_proj.weight`], inner);
        break;
      }
      case "attention": {
        const { num_attention_heads: heads, num_key_value_heads: kv, head_dim: dim } = config;
        reads(["q_proj", "k_proj", "v_proj"]);
        add([[`${mixer}.v_proj.weight`, -1, 0, kv * dim], [`${mixer}.v_proj.bias`, -1, 0, kv * dim]],
          [`${mixer}.o_proj.weight`], heads * dim,
          (i) => Math.floor(i / dim / (heads / kv)) * dim + i % dim);
        break;
      }
      case "mlp":
        reads(["up_proj"]);
        mlp(mixer, spec.intermediate_size);
        break;
      case "moe": {
        const { n_routed_experts: count, moe_intermediate_size: width, moe_latent_size: latent } = spec;
        const experts = Array.from({ length: count }, (_, e) => `${mixer}.experts.${e}`);
        const gate = config.shared_expert_gate ? ["shared_expert_gate"] : [];
        const shared = spec.shared_size > 0 ? ["shared_experts.up_proj", ...gate] : [];
        const ups = experts.map((path) => `${path}.up_proj.weight`);
        if (latent === null) {
          const names = experts.map((_, e) => `experts.${e}.up_proj`);
          reads(["gate", ...names, ...shared]);
        } else {
          reads(["gate", "fc1_latent_proj", ...shared]);
          add([[`${mixer}.fc1_latent_proj.weight`, -1], [`${mixer}.fc1_latent_proj.bias`, -1]], ups, latent);
        }
        for (const path of experts) mlp(path, width);
        if (latent !== null) {
          add(experts.map((path): [string, number] => [`${path}.down_proj.weight`, -1]),
            [`${mixer}.fc2_latent_proj.weight`], latent);
        }
        if (spec.shared_size > 0) mlp(`${mixer}.shared_experts`, spec.shared_size);
        break;
      }
    }
  };
  layerSpecs(config).forEach((spec, i) => layer(spec, `backbone.layers.${i}`));
  const mtp = mtpSpecs(config);
  // A prediction block normalises the final norm's output again, and is fed with its own.
  if (mtp.length === 0) add([["backbone.norm_f.weight", -1]], ["lm_head.weight"], hidden);
  mtp.forEach((spec, i) => {
    if (i === 0) {
      add([["mtp.layers.0.enorm.weight", -1, 0, hidden], ["mtp.layers.0.hnorm.weight", -1, hidden, hidden]],
        ["mtp.layers.0.eh_proj.weight"], 2 * hidden);
    }
    layer(spec, `mtp.layers.${i}`);
  });
  return folds;
}

/** Exponents of the search. */
export const ALPHAS = Array.from({ length: 11 }, (_, i) => i / 10);

/**
 * The scales of a fold for one exponent: x^a / w^(1 - a), centred so that the largest and the smallest are
 * reciprocal.
 * @param x mean magnitude of every input channel
 * @param w mean magnitude of every weight column, relative to the largest of its block
 */
export function channelScales(x: Float64Array, w: Float64Array, alpha: number, fold: Fold): Float64Array {
  const { width, source } = fold;
  const scales = new Float64Array(width);
  for (let i = 0; i < width; i++) {
    const scale = Math.max(x[i]!, 1e-8) ** alpha / Math.max(w[i]!, 1e-8) ** (1 - alpha);
    scales[i] = Math.min(Math.max(scale, 1e-8), 1e8);
  }
  if (source) {
    // Channels that share a scale take the geometric mean of theirs.
    const sums = new Map<number, [number, number]>();
    for (let i = 0; i < width; i++) {
      const [sum, count] = sums.get(source(i)) ?? [0, 0];
      sums.set(source(i), [sum + Math.log(scales[i]!), count + 1]);
    }
    for (let i = 0; i < width; i++) {
      const [sum, count] = sums.get(source(i))!;
      scales[i] = Math.exp(sum / count);
    }
  }
  let [least, most] = [Infinity, 0];
  for (const scale of scales) [least, most] = [Math.min(least, scale), Math.max(most, scale)];
  const centre = Math.sqrt(least * most);
  return scales.map((scale) => Math.min(Math.max(scale / centre, 1e-4), 1e4));
}

/**
 * Mean over the rows of |w| relative to the largest of its block, by column; of several matrices together.
 */
export function columnWeights(
  matrices: readonly { readonly values: Float32Array; readonly format: TargetFormat }[], width: number,
): Float64Array {
  const means = new Float64Array(width);
  let rows = 0;
  for (const { values, format } of matrices) {
    const block = BLOCK[format] === 1 ? width : BLOCK[format];
    for (let from = 0; from < values.length; from += block) {
      let largest = 0;
      for (let i = from; i < from + block; i++) largest = Math.max(largest, Math.abs(values[i]!));
      if (largest === 0) continue;
      for (let i = from; i < from + block; i++) means[i % width]! += Math.abs(values[i]!) / largest;
    }
    rows += values.length / width;
  }
  return means.map((mean) => mean / Math.max(rows, 1));
}

/** Mean magnitude of every input channel over the consumers' inputs. */
export function inputMagnitudes(stats: readonly InputStats[], width: number): Float64Array {
  const means = new Float64Array(width);
  const rows = stats.reduce((sum, each) => sum + each.rows, 0);
  for (const each of stats) for (let i = 0; i < width; i++) means[i]! += each.sum[i]! / Math.max(rows, 1);
  return means;
}

/** The values with every column multiplied by its scale. */
export function scaleColumns(values: Float32Array, scales: Float64Array): Float32Array {
  const width = scales.length;
  return values.map((value, i) => value * scales[i % width]!);
}

/**
 * Moves the scales: producers and consumers among `values` are replaced, the inputs' statistics follow.
 * @returns the names of the tensors that changed
 */
export function applyFold(
  fold: Fold, scales: Float64Array, values: Map<string, Float32Array>,
  inputs: ReadonlyMap<string, InputStats>,
): string[] {
  const changed: string[] = [];
  const { width, source } = fold;
  for (const name of fold.consumers) {
    values.set(name, scaleColumns(values.get(name)!, scales));
    inputs.get(name)?.divide(scales);
    changed.push(name);
  }
  for (const { name, first, count, power } of fold.producers) {
    const old = values.get(name);
    if (!old) continue; // a bias that the model does not have
    const factors = new Float64Array(count);
    for (let i = 0; i < width; i++) {
      const to = (source ? source(i) : i) - first;
      if (to >= 0 && to < count) factors[to] = scales[i]! ** power;
    }
    const columns = old.length / count;
    values.set(name, old.map((value, i) => value * factors[Math.floor(i / columns)]!));
    changed.push(name);
  }
  return changed;
}

/**
 * Names and shapes of a model's parameters, and where they are found in a checkpoint.
 *
 * Canonical names are those of the published checkpoints (`backbone.layers.3.mixer.q_proj.weight`), with one
 * exception: the model holds the experts of a layer as one stacked tensor, `...mixer.experts.up_proj`
 * (experts, width, input). Checkpoints have one tensor per expert; the stacked form is read as well.
 */
import { FormatError } from "../tensor/errors.ts";
import { convSize, innerSize, layerSpecs, mtpSpecs } from "./config.ts";
import type { LayerSpec, NemotronHConfig } from "./config.ts";

/** What a parameter is; linear weights are told apart by what quantised releases keep in higher precision. */
export type ParameterKind =
  | "embedding" | "head" | "norm" | "bias" | "conv" | "ssm" | "router" | "router_bias" | "expert"
  | "mamba_linear" | "attention_linear" | "mlp_linear" | "shared_linear" | "latent_linear" | "mtp_linear";

export interface Parameter {
  readonly name: string;
  readonly shape: readonly number[];
  readonly kind: ParameterKind;
  readonly part: "backbone" | "mtp";
  /** Position in the chain, or in the prediction block; null for what lies outside the layers. */
  readonly layer: number | null;
  /** False for router_bias alone, which load balancing moves, not the loss. */
  readonly trainable: boolean;
  /** True for biases that some checkpoints leave out although their configuration has them: then zero. */
  readonly optional: boolean;
}

/** A tensor as checkpoints store it: a parameter, or one expert of a stacked parameter. */
export interface CheckpointTensor {
  readonly name: string;
  readonly shape: readonly number[];
  readonly parameter: Parameter;
  /** Number of the expert; null for a whole parameter. */
  readonly expert: number | null;
}

/** All parameters that the model holds, in the order of the forward pass. */
export function listParameters(config: NemotronHConfig): Parameter[] {
  const { vocab_size: vocab, hidden_size: hidden } = config;
  const list: Parameter[] = [];
  const outside = { part: "backbone", layer: null, trainable: true, optional: false } as const;
  list.push({ name: "backbone.embeddings.weight", shape: [vocab, hidden], kind: "embedding", ...outside });
  layerSpecs(config).forEach((spec, i) => list.push(...layerParameters(config, spec, "backbone", i)));
  list.push({ name: "backbone.norm_f.weight", shape: [hidden], kind: "norm", ...outside });
  list.push({ name: "lm_head.weight", shape: [vocab, hidden], kind: "head", ...outside });

  const mtp = mtpSpecs(config);
  mtp.forEach((spec, i) => {
    const inside = { part: "mtp", layer: i, trainable: true, optional: false } as const;
    const make = (name: string, kind: ParameterKind, shape: number[]): Parameter =>
      ({ name: `mtp.layers.${i}.${name}`, shape, kind, ...inside });
    if (i === 0) {
      list.push(make("enorm.weight", "norm", [hidden]), make("hnorm.weight", "norm", [hidden]));
      list.push(make("eh_proj.weight", "mtp_linear", [hidden, 2 * hidden]));
    }
    list.push(...layerParameters(config, spec, "mtp", i));
    if (i === mtp.length - 1) list.push(make("final_layernorm.weight", "norm", [hidden]));
  });
  return list;
}

function layerParameters(
  config: NemotronHConfig, spec: LayerSpec, part: "backbone" | "mtp", layer: number,
): Parameter[] {
  const list: Parameter[] = [];
  const add = (name: string, kind: ParameterKind, shape: readonly number[], optional = false): void => {
    const trainable = kind !== "router_bias";
    list.push({ name: `${part}.layers.${layer}.${name}`, shape, kind, part, layer, trainable, optional });
  };
  /** A linear layer [out, in], with its bias where there is one. */
  const linear = (
    name: string, kind: ParameterKind, out: number, input: number, bias = false, optional = false,
  ): void => {
    add(`mixer.${name}.weight`, kind, [out, input]);
    if (bias) add(`mixer.${name}.bias`, "bias", [out], optional);
  };
  const { hidden_size: hidden } = config;
  add("norm.weight", "norm", [hidden]);
  switch (spec.kind) {
    case "mamba": {
      const { mamba_num_heads: heads, conv_kernel: window, use_bias: bias } = config;
      const inner = innerSize(config);
      const channels = convSize(config);
      linear("in_proj", "mamba_linear", inner + channels + heads, hidden, bias);
      add("mixer.conv1d.weight", "conv", [channels, 1, window]);
      if (config.use_conv_bias) add("mixer.conv1d.bias", "bias", [channels]);
      for (const name of ["A_log", "D", "dt_bias"]) add(`mixer.${name}`, "ssm", [heads]);
      add("mixer.norm.weight", "norm", [inner]);
      linear("out_proj", "mamba_linear", hidden, inner, bias);
      break;
    }
    case "attention": {
      const { num_attention_heads: heads, num_key_value_heads: kv, head_dim: dim } = config;
      const bias = config.attention_bias;
      linear("q_proj", "attention_linear", heads * dim, hidden, bias, true);
      linear("k_proj", "attention_linear", kv * dim, hidden, bias, true);
      linear("v_proj", "attention_linear", kv * dim, hidden, bias, true);
      linear("o_proj", "attention_linear", hidden, heads * dim, bias, true);
      break;
    }
    case "mlp":
      linear("up_proj", "mlp_linear", spec.intermediate_size, hidden, config.mlp_bias);
      linear("down_proj", "mlp_linear", hidden, spec.intermediate_size, config.mlp_bias);
      break;
    case "moe": {
      const { n_routed_experts: experts, moe_intermediate_size: width, moe_latent_size: latent } = spec;
      const input = latent ?? hidden;
      linear("gate", "router", experts, hidden);
      add("mixer.gate.e_score_correction_bias", "router_bias", [experts]);
      const { mlp_bias: bias } = config;
      if (latent !== null) linear("fc1_latent_proj", "latent_linear", latent, hidden, bias, true);
      add("mixer.experts.up_proj", "expert", [experts, width, input]);
      add("mixer.experts.down_proj", "expert", [experts, input, width]);
      if (latent !== null) linear("fc2_latent_proj", "latent_linear", hidden, latent, bias, true);
      if (spec.shared_size > 0) {
        linear("shared_experts.up_proj", "shared_linear", spec.shared_size, hidden, bias, true);
        linear("shared_experts.down_proj", "shared_linear", hidden, spec.shared_size, bias, true);
        if (config.shared_expert_gate) linear("shared_expert_gate", "router", 1, hidden);
      }
      break;
    }
  }
  return list;
}

/** The tensors that hold a parameter in a published checkpoint: itself, or one for each expert. */
export function tensorsOf(parameter: Parameter): CheckpointTensor[] {
  const { name, shape, kind } = parameter;
  if (kind !== "expert") return [{ name, shape, parameter, expert: null }];
  const dot = name.lastIndexOf(".");
  const [path, leaf] = [name.slice(0, dot), name.slice(dot + 1)];
  return Array.from({ length: shape[0]! }, (_, expert) =>
    ({ name: `${path}.${expert}.${leaf}.weight`, shape: shape.slice(1), parameter, expert }));
}

/** All tensors of a published checkpoint of this model. */
export function listCheckpointTensors(config: NemotronHConfig): CheckpointTensor[] {
  return listParameters(config).flatMap(tensorsOf);
}

/** What a checkpoint says of a tensor. */
export interface FoundTensor {
  readonly dtype: string;
  readonly shape: readonly number[];
}

/**
 * Where a parameter comes from: one tensor as it is, one tensor per expert in order, or nowhere (zeros).
 * The names are the checkpoint's own.
 */
export interface Placement {
  readonly parameter: Parameter;
  readonly from: "whole" | "experts" | "zeros";
  readonly tensors: readonly string[];
}

export interface ResolveOptions {
  /** Name for messages; default "checkpoint". */
  readonly what?: string;
  /** Tensors of the checkpoint that the model has no use for: refuse them (default), or leave them. */
  readonly extra?: "refuse" | "ignore";
}

/** Scales and the like, which belong to the tensor `weight` beside them. */
const COMPANION =
  /\.(?:weight_scale|weight_scale_2|input_scale|weight_global_scale|input_global_scale|[kv]_scale)$/;

/**
 * The canonical name for a name found in a checkpoint: without `language_model.`, `backbone.` for `model.`,
 * `embeddings` for `embedding` and `embed_tokens`, `weight` for `weight_packed`.
 */
export function canonicalName(name: string): string {
  return name
    .replace(/^(?:model\.)?language_model\./, "")
    .replace(/^model\.(?=backbone\.|mtp\.|lm_head\.)/, "")
    .replace(/^model\./, "backbone.")
    .replace(/^backbone\.(?:embedding|embed_tokens)\.weight/, "backbone.embeddings.weight")
    .replace(/\.weight_packed$/, ".weight");
}

/**
 * Finds every parameter of the model among the tensors of a checkpoint.
 * Throws FormatError for the first tensor that is missing, has another shape, occurs under two names or has
 * no place in the model, and says how many more there are.
 */
export function resolveTensors(
  config: NemotronHConfig, found: ReadonlyMap<string, FoundTensor>, options: ResolveOptions = {},
): Placement[] {
  const { placements, problems } = checkTensors(config, found, options);
  if (problems.length === 0) return placements;
  const more = problems.length > 1 ? ` (and ${problems.length - 1} more)` : "";
  throw new FormatError(`${options.what ?? "checkpoint"}: ${problems[0]!}${more}`);
}

/** As resolveTensors, but returns one sentence for every tensor that does not fit. */
export function checkTensors(
  config: NemotronHConfig, found: ReadonlyMap<string, FoundTensor>, options: ResolveOptions = {},
): { placements: Placement[]; problems: string[] } {
  const problems: string[] = [];
  const byName = new Map<string, string>();
  // A multimodal checkpoint holds other models beside the language model.
  const nested = [...found.keys()].some((name) => /^(?:model\.)?language_model\./.test(name));
  for (const name of found.keys()) {
    if (nested && !name.includes("language_model.")) continue;
    const canonical = canonicalName(name);
    const other = byName.get(canonical);
    if (other === undefined) byName.set(canonical, name);
    else problems.push(`tensor "${name}": expected one of this meaning, found "${other}" too`);
  }
  const used = new Set<string>();
  const take = (canonical: string, shape: readonly number[]): string | undefined => {
    const name = byName.get(canonical);
    if (name === undefined) return undefined;
    used.add(canonical);
    const problem = shapeProblem(found, name, shape);
    if (problem !== null) problems.push(`tensor "${name}": ${problem}`);
    return name;
  };

  const placements = listParameters(config).map((parameter): Placement => {
    const { name, shape } = parameter;
    const whole = take(name, shape);
    if (whole !== undefined) return { parameter, from: "whole", tensors: [whole] };
    if (parameter.optional) return { parameter, from: "zeros", tensors: [] };
    const tensors: string[] = [];
    for (const part of tensorsOf(parameter)) {
      const tensor = part.name === name ? undefined : take(part.name, part.shape);
      if (tensor !== undefined) tensors.push(tensor);
      else problems.push(`tensor "${part.name}": expected [${part.shape.join(", ")}], found none`);
    }
    return { parameter, from: "experts", tensors };
  });

  for (const [canonical, name] of options.extra === "ignore" ? [] : byName) {
    const owner = canonical.replace(COMPANION, ".weight");
    if (!used.has(canonical) && !(owner !== canonical && used.has(owner))) {
      problems.push(`tensor "${name}": expected no tensor of that name in this model, found one`);
    }
  }
  return { placements, problems };
}

/** What is wrong with the shape of a tensor that should hold `shape`; null when nothing is. */
function shapeProblem(
  found: ReadonlyMap<string, FoundTensor>, name: string, shape: readonly number[],
): string | null {
  const { dtype, shape: has } = found.get(name)!;
  const expected = dtype === "U8" ? packedShape(shape) : shape;
  if (expected?.join() === has.join()) return null;
  const wanted = expected === null ? `floats in [${shape.join(", ")}]` : `${dtype} [${expected.join(", ")}]`;
  return `expected ${wanted}, found ${dtype} [${has.join(", ")}]`;
}

/** Two 4-bit codes per byte along the last dimension; null where that cannot be. */
function packedShape(shape: readonly number[]): number[] | null {
  const last = shape.at(-1);
  return last === undefined || shape.length < 2 || last % 2 !== 0 ? null : [...shape.slice(0, -1), last / 2];
}

/** What a model costs: parameters, state, memory to run and to train; and its layers as a line of text. */
import { MOMENT_BLOCK, type MomentFormat } from "../ops/adamw.ts";
import { ConfigError } from "../tensor/errors.ts";
import { sizeOf } from "../tensor/ndarray.ts";
import { listParameters } from "./checkpoint_names.ts";
import type { Parameter, ParameterKind } from "./checkpoint_names.ts";
import { convSize, innerSize, layerSpecs, letterOf, mtpSpecs } from "./config.ts";
import type { LayerSpec, NemotronHConfig } from "./config.ts";
import type { TrainedFormat } from "./parameters.ts";

export interface ParameterCount {
  /** Everything stored, the prediction block included. */
  readonly total: number;
  readonly backbone: number;
  readonly mtp: number;
  /** Backbone parameters that one token meets: all but the experts it is not sent to. */
  readonly active: number;
  /** The same without the embedding table and the head. */
  readonly activeWithoutEmbeddings: number;
  readonly byKind: ReadonlyMap<ParameterKind, number>;
}

/** Counts parameters. Throws ConfigError beyond 2^53 - 1. */
export function countParameters(config: NemotronHConfig): ParameterCount {
  const specs = layerSpecs(config);
  const byKind = new Map<ParameterKind, number>();
  let [backbone, mtp, active, tables] = [0, 0, 0, 0];
  for (const { kind, shape, part, layer } of listParameters(config)) {
    const size = sizeOf(shape);
    byKind.set(kind, (byKind.get(kind) ?? 0) + size);
    if (part === "mtp") {
      mtp += size;
      continue;
    }
    backbone += size;
    if (kind === "embedding" || kind === "head") tables += size;
    const spec = layer === null ? undefined : specs[layer];
    const isExpert = kind === "expert" && spec?.kind === "moe";
    active += isExpert ? (size / spec.n_routed_experts) * spec.num_experts_per_tok : size;
  }
  const total = backbone + mtp;
  if (!Number.isSafeInteger(total)) {
    throw new ConfigError(`model: expected at most 2^53 - 1 parameters, found ${total}`);
  }
  return { total, backbone, mtp, active, activeWithoutEmbeddings: active - tables, byKind };
}

/** Tensors in a published checkpoint of this model. */
export function countTensors(config: NemotronHConfig): number {
  const tensors = ({ kind, shape }: Parameter): number => (kind === "expert" ? shape[0]! : 1);
  return listParameters(config).reduce((sum, parameter) => sum + tensors(parameter), 0);
}

/**
 * Floating-point operations of the forward pass per token, counted as the model needs them and not as a
 * kernel does them: 2 for every weight of a product or convolution that the token meets, 4 per head channel
 * and visible key, 5 for every number in the recurrent state. A training step counts three times as much.
 * @param keys mean number of positions that an attention layer sees
 * @param mtpDepths predictions beyond the next token; each passes the prediction block and the head
 */
export function forwardFlops(config: NemotronHConfig, keys: number, mtpDepths = 0): number {
  const { layers, mtp, head } = flopsByLayer(config, keys);
  return layers.reduce((sum, flops) => sum + flops, head) + mtpDepths * (mtp + head);
}

export interface LayerFlops {
  /** Each layer of the chain. */
  readonly layers: readonly number[];
  /** The prediction block at one depth, without the head. */
  readonly mtp: number;
  readonly head: number;
}

/** The operations that forwardFlops counts, where they are done. */
export function flopsByLayer(config: NemotronHConfig, keys: number): LayerFlops {
  const specs = { backbone: layerSpecs(config), mtp: mtpSpecs(config) };
  const besides = ({ kind }: LayerSpec): number => {
    if (kind === "mamba") return 5 * innerSize(config) * config.ssm_state_size;
    return kind === "attention" ? 4 * config.num_attention_heads * config.head_dim * keys : 0;
  };
  const flops = { backbone: specs.backbone.map(besides), mtp: specs.mtp.map(besides) };
  for (const { kind, shape, part, layer } of listParameters(config)) {
    const spec = layer === null ? undefined : specs[part][layer];
    if (layer === null || shape.length < 2) continue;
    const share = kind === "expert" && spec?.kind === "moe"
      ? spec.num_experts_per_tok / spec.n_routed_experts
      : 1;
    flops[part][layer]! += 2 * sizeOf(shape) * share;
  }
  const mtp = flops.mtp.reduce((sum, layer) => sum + layer, 0);
  return { layers: flops.backbone, mtp, head: 2 * config.vocab_size * config.hidden_size };
}

const BYTES = { float32: 4, float16: 2, bfloat16: 2, float8_e4m3fn: 1 } as const;
export type CacheDType = keyof typeof BYTES;

/** Bytes that one sequence keeps from token to token. */
export interface StateBytes {
  /** SSM state of one Mamba-2 layer. */
  readonly ssmPerLayer: number;
  readonly ssm: number;
  /** Last inputs of the convolutions, all layers. */
  readonly conv: number;
  /** Keys and values of one token, all attention layers. */
  readonly kvPerToken: number;
}

/**
 * State of one sequence, without the prediction block.
 * @param options.ssm number format of the SSM state; default: the configuration's mamba_ssm_cache_dtype
 * @param options.conv of the convolution history, default float32
 * @param options.kv of keys and values, default float32
 */
export function stateBytes(
  config: NemotronHConfig,
  options: { readonly ssm?: CacheDType; readonly conv?: CacheDType; readonly kv?: CacheDType } = {},
): StateBytes {
  const layers = countLayers(config.hybrid_override_pattern);
  const ssmDType = options.ssm ?? config.mamba_ssm_cache_dtype;
  const ssmPerLayer = innerSize(config) * config.ssm_state_size * BYTES[ssmDType];
  const convPerLayer = convSize(config) * config.conv_kernel * BYTES[options.conv ?? "float32"];
  const kvWidth = 2 * config.num_key_value_heads * config.head_dim * BYTES[options.kv ?? "float32"];
  return {
    ssmPerLayer,
    ssm: layers.mamba * ssmPerLayer,
    conv: layers.mamba * convPerLayer,
    kvPerToken: layers.attention * kvWidth,
  };
}

/** How many layers of each kind a pattern has. */
export function countLayers(pattern: string): Record<LayerSpec["kind"], number> {
  const count = (letter: string) => pattern.split(letter).length - 1;
  return { mamba: count("M"), attention: count("*"), mlp: count("-"), moe: count("E") };
}

export type RunFormat = "f32" | "f16" | "bf16" | "fp8" | "nvfp4";

/** Kinds that FP8 and NVFP4 releases quantise; the rest stays in bf16. */
const QUANTISED: ReadonlySet<ParameterKind> = new Set([
  "mamba_linear", "mlp_linear", "shared_linear", "expert",
]);

/** Bytes of all weights in a number format. NVFP4: half a byte, and one scale byte for 16 weights. */
export function weightBytes(config: NemotronHConfig, format: RunFormat): number {
  const bytes = ({ kind, shape }: Parameter): number => {
    const size = sizeOf(shape);
    if (format === "f32") return 4 * size;
    if (format === "f16" || format === "bf16" || !QUANTISED.has(kind)) return 2 * size;
    return format === "fp8" ? size : size / 2 + Math.ceil(size / 16);
  };
  return listParameters(config).reduce((sum, parameter) => sum + bytes(parameter), 0);
}

/** Matrices of products, which alone are in bf16 where weights are. */
const HALVED: readonly ParameterKind[] = [
  ...QUANTISED, "head", "attention_linear", "latent_linear", "mtp_linear",
];

export interface RunMemory {
  readonly weights: number;
  /** State of all sequences: SSM, convolution, keys and values at full length. */
  readonly state: number;
  readonly total: number;
}

/**
 * Bytes to generate text: weights and state. Working buffers come on top; they are small beside these.
 * @param batch sequences at a time
 * @param tokens longest sequence, prompt included
 */
export function memoryToRun(
  config: NemotronHConfig, format: RunFormat, batch: number, tokens: number,
): RunMemory {
  const kv: CacheDType = format === "f32" ? "float32" : "bfloat16";
  const { ssm, conv, kvPerToken } = stateBytes(config, { kv });
  const weights = weightBytes(config, format);
  const state = batch * (ssm + conv + tokens * kvPerToken);
  return { weights, state, total: weights + state };
}

/** What training stores in which format: see `Recipe`. */
export interface TrainFormats {
  readonly weights: TrainedFormat;
  readonly master: "f32" | "none";
  readonly moments: MomentFormat;
}

const F32_TRAINING: TrainFormats = { weights: "f32", master: "f32", moments: "f32" };

/**
 * Bytes per parameter of a matrix in training: weights (f32 4; bf16 2, and 2 more for the lower halves of f32
 * masters), f32 gradients 4, both moments 8, 4 or 2.125. What is no matrix of a product has f32 weights.
 */
export function trainingBytes({ weights, master, moments }: TrainFormats) {
  const bytes = {
    weights: weights === "bf16" && master === "none" ? 2 : 4, gradients: 4,
    optimizer: { f32: 8, bf16: 4, "8bit": 2 * (1 + 4 / MOMENT_BLOCK) }[moments],
  };
  return { ...bytes, total: bytes.weights + bytes.gradients + bytes.optimizer };
}

export interface TrainMemory {
  /** With their masters. */
  readonly weights: number;
  readonly gradients: number;
  /** Both AdamW moments. */
  readonly optimizer: number;
  /** Estimate of what the forward pass keeps for the backward pass. */
  readonly activations: number;
  readonly total: number;
}

/**
 * Bytes to train with AdamW, without recomputation; activations in float32.
 * @param tokens in one micro-batch (batch * seqlen)
 */
export function memoryToTrain(
  config: NemotronHConfig, tokens: number, formats: TrainFormats = F32_TRAINING,
): TrainMemory {
  const { total: count, byKind } = countParameters(config);
  const trainable = count - (byKind.get("router_bias") ?? 0);
  let matrices = 0;
  for (const kind of HALVED) matrices += byKind.get(kind) ?? 0;
  const each = trainingBytes(formats);
  const weights = 4 * (count - matrices) + each.weights * matrices;
  const gradients = each.gradients * trainable;
  const optimizer = each.optimizer * trainable;
  const activations = 4 * tokens * activationsPerToken(config);
  return { weights, gradients, optimizer, activations, total: weights + gradients + optimizer + activations };
}

/**
 * Estimate of the float32 values per token that the forward pass keeps: inputs of every product, every norm
 * and the scan, chunk states, and the outputs that backward passes read. Logits are never kept.
 */
export function activationsPerToken(config: NemotronHConfig): number {
  const { hidden_size: hidden } = config;
  const specs = [...layerSpecs(config), ...mtpSpecs(config)];
  const layers = specs.reduce((sum, spec) => sum + layerActivations(config, spec), 0);
  // The final norm and the head's input; the prediction block keeps its own, in two halves and joined.
  return layers + 2 * hidden + (config.num_nextn_predict_layers > 0 ? 8 * hidden : 0);
}

function layerActivations(config: NemotronHConfig, spec: LayerSpec): number {
  const { hidden_size: hidden } = config;
  // The residual stream before the layer (the norm's input), the norm's output, and the mixer's output.
  const around = 3 * hidden;
  switch (spec.kind) {
    case "mamba": {
      const { mamba_num_heads: heads, ssm_state_size: state, chunk_size: chunk, n_groups: groups } = config;
      const inner = innerSize(config);
      const channels = convSize(config);
      const proj = 2 * (inner + channels + heads);
      const scan = 2 * channels + 2 * heads + groups * chunk + (2 * inner * state) / chunk;
      return around + proj + scan + 2 * inner;
    }
    case "attention": {
      const { num_attention_heads: heads, num_key_value_heads: kv, head_dim: dim } = config;
      return around + 2 * heads * dim + 2 * kv * dim + heads;
    }
    case "mlp":
      return around + 2 * spec.intermediate_size;
    case "moe": {
      const { num_experts_per_tok: chosen, n_routed_experts: experts, moe_intermediate_size: width } = spec;
      const input = spec.moe_latent_size ?? hidden;
      const routed = chosen * (2 * input + 2 * width) + 2 * input;
      return around + experts + 2 * chosen + routed + 2 * spec.shared_size;
    }
  }
}

/**
 * The layers as text: the pattern in rows of `width` letters with the number of the first, then one line for
 * each kind of layer with its count and sizes.
 */
export function layerStrip(config: NemotronHConfig, width = 50): string {
  const pattern = config.hybrid_override_pattern;
  const digits = String(pattern.length - 1).length;
  const rows: string[] = [];
  for (let i = 0; i < pattern.length; i += width) {
    rows.push(`${String(i).padStart(digits)}  ${pattern.slice(i, i + width)}`);
  }
  if (config.mtp_hybrid_override_pattern !== "") {
    rows.push(`${"+".padStart(digits)}  ${config.mtp_hybrid_override_pattern}  predicts one more token`);
  }
  const groups = new Map<string, number>();
  for (const spec of layerSpecs(config)) {
    const line = `${letterOf(spec.kind)} ${describe(config, spec)}`;
    groups.set(line, (groups.get(line) ?? 0) + 1);
  }
  const countWidth = String(Math.max(...groups.values())).length;
  const legend = [...groups].map(([line, count]) => `${String(count).padStart(countWidth)} x ${line}`);
  return [...rows, "", ...legend].join("\n");
}

function describe(config: NemotronHConfig, spec: LayerSpec): string {
  switch (spec.kind) {
    case "mamba":
      return `Mamba-2: ${config.mamba_num_heads} heads of ${config.mamba_head_dim}, `
        + `state ${config.ssm_state_size}, ${config.n_groups} groups`;
    case "attention":
      return `attention: ${config.num_attention_heads} query and ${config.num_key_value_heads} key heads of `
        + `${config.head_dim}`;
    case "mlp":
      return `MLP: ${spec.intermediate_size} wide`;
    case "moe": {
      const latent = spec.moe_latent_size === null ? "" : ` in ${spec.moe_latent_size} latent`;
      const shared = spec.shared_size > 0 ? `, shared ${spec.shared_size} wide` : "";
      const choice = `${spec.num_experts_per_tok} of ${spec.n_routed_experts}`;
      return `experts: ${choice}, ${spec.moe_intermediate_size} wide${latent}${shared}`;
    }
  }
}

/**
 * The small hybrid model that language-model engines are compared on: random weights of Nemotron-H geometry,
 * matrices rounded to 4-bit blocks, its GGUF file, and its float64 answer.
 */
import { type NdArray, type NemotronHConfig, ndarray, parseConfig } from "../../src/index.ts";
import * as reference from "../../src/reference/index.ts";
import { fromBlocks, toBlocks } from "./blocks.ts";
import { type GgufTensor, type Setting, encodeGguf } from "./gguf.ts";
import { type Input, random } from "./random.ts";

export type Weights = Readonly<Record<string, Input>>;

const SIZES = {
  vocab_size: 4096, hidden_size: 512, num_attention_heads: 8, num_key_value_heads: 2, head_dim: 64,
  intermediate_size: 2048, mamba_num_heads: 16, mamba_head_dim: 64, ssm_state_size: 128, n_groups: 8,
  conv_kernel: 4, chunk_size: 64, max_position_embeddings: 4096, torch_dtype: "float32",
  n_routed_experts: 16, num_experts_per_tok: 4, moe_intermediate_size: 256,
  moe_shared_expert_intermediate_size: 512, routed_scaling_factor: 2.5,
};

/** 21.8 million parameters without experts, 29.6 million with them. */
export const DENSE = parseConfig({ ...SIZES, hybrid_override_pattern: "M-M*M-M-" });
export const MOE = parseConfig({ ...SIZES, hybrid_override_pattern: "MEM*MEME" });

/** Whether a parameter is stored in 4-bit blocks; norms, the router and the recurrence stay f32. */
export function isMatrix(name: string): boolean {
  return /(?:_proj|embeddings\.weight|lm_head\.weight)/.test(name);
}

/** Names and shapes of all parameters; no layer has biases but the convolution. */
export function parameterShapes(config: NemotronHConfig): [name: string, shape: number[]][] {
  const { vocab_size: V, hidden_size: D, mamba_num_heads: H, n_routed_experts: E } = config;
  const { moe_intermediate_size: F, moe_shared_expert_intermediate_size: S } = config;
  const inner = H * config.mamba_head_dim;
  const channels = inner + 2 * config.n_groups * config.ssm_state_size;
  const [heads, kv] = [config.num_attention_heads, config.num_key_value_heads].map(
    (n) => n * config.head_dim);
  const ff = config.intermediate_size as number;
  const mixers: Record<string, Record<string, number[]>> = {
    M: {
      "in_proj.weight": [inner + channels + H, D], "conv1d.weight": [channels, 1, config.conv_kernel],
      "conv1d.bias": [channels], A_log: [H], D: [H], dt_bias: [H], "norm.weight": [inner],
      "out_proj.weight": [D, inner],
    },
    "*": {
      "q_proj.weight": [heads!, D], "k_proj.weight": [kv!, D], "v_proj.weight": [kv!, D],
      "o_proj.weight": [D, heads!],
    },
    "-": { "up_proj.weight": [ff, D], "down_proj.weight": [D, ff] },
    E: {
      "gate.weight": [E, D], "gate.e_score_correction_bias": [E], "experts.up_proj": [E, F, D],
      "experts.down_proj": [E, D, F], "shared_experts.up_proj.weight": [S, D],
      "shared_experts.down_proj.weight": [D, S],
    },
  };
  return [
    ["backbone.embeddings.weight", [V, D]],
    ...[...config.hybrid_override_pattern].flatMap((letter, i): [string, number[]][] => [
      [`backbone.layers.${i}.norm.weight`, [D]],
      ...Object.entries(mixers[letter]!).map(([name, shape]): [string, number[]] =>
        [`backbone.layers.${i}.mixer.${name}`, shape]),
    ]),
    ["backbone.norm_f.weight", [D]], ["lm_head.weight", [V, D]],
  ];
}

/** All parameters by the names of published checkpoints; the experts of a layer are one stacked tensor. */
export function hybridWeights(config: NemotronHConfig): Weights {
  const layers = config.num_hidden_layers;
  return Object.fromEntries(parameterShapes(config).map(([name, shape], seed): [string, Input] => {
    const uniform = (low: number, high: number) =>
      random(seed, shape, 1).data.map((x) => low + ((high - low) * (x / Math.sqrt(3) + 1)) / 2);
    const near = (centre: number, deviation: number) => random(seed, shape, deviation).data.map(
      (x) => centre + x);
    const deviation = name.includes("embeddings")
      ? 1 : 1 / Math.sqrt(shape.at(-1)! * (/(?:out|o|down)_proj/.test(name) ? layers : 1));
    const data =
      isMatrix(name) ? fromBlocks(toBlocks(random(seed, shape, deviation).data, 4))
        : name.endsWith("A_log") ? uniform(1, 16).map(Math.log)
          : name.endsWith("dt_bias")
            // The inverse of softplus at steps of 0.001 to 0.1, evenly in their logarithms.
            ? uniform(Math.log(1e-3), Math.log(0.1)).map((x) => Math.log(Math.expm1(Math.exp(x))))
            : name.endsWith("conv1d.weight") ? near(0, 0.5)
              : name.endsWith("conv1d.bias") || name.endsWith("correction_bias") ? near(0, 0.1)
                : name.endsWith("gate.weight") ? near(0, deviation)
                  : near(1, 0.1);
    return [name, { shape, data }];
  }));
}

/**
 * Three special pieces, and the bytes that a tokenizer falls back to. They are not marked as bytes below:
 * then a tokenizer finds them by their names all the same, but each alone is shown as valid text.
 */
const SPECIAL = ["<unk>", "<s>", "</s>", ...Array.from(
  { length: 256 }, (_, i) => `<0x${i.toString(16).toUpperCase().padStart(2, "0")}>`)];
/** The character that piece 0 would be: every other piece is one character of a large alphabet. */
const FIRST_CHARACTER = 0x4e00;

/** The text that is tokenized to these ids; for ids of characters only. */
export function textOf(ids: readonly number[]): string {
  return String.fromCodePoint(...ids.map((id) => FIRST_CHARACTER + id));
}

/** Token ids of a prompt, the same each time. */
export function prompt(length: number): number[] {
  return Array.from({ length }, (_, i) =>
    SPECIAL.length + ((i * 2654435761 + 12345) % (SIZES.vocab_size - SPECIAL.length)));
}

/** Logits after the last token of `tokens`, less their mean. */
export function expectedLogits(config: NemotronHConfig, weights: Weights, tokens: readonly number[]): number[
  ] {
  const eps = config.layer_norm_epsilon;
  const get = (name: string): NdArray => {
    const { shape, data } = weights[name]!;
    return ndarray(shape, Float64Array.from(data));
  };
  const L = tokens.length;
  const ids = ndarray([1, L], Float64Array.from(tokens));
  let x = reference.embedding(ids, get("backbone.embeddings.weight"));
  [...config.hybrid_override_pattern].forEach((letter, i) => {
    const of = (name: string) => get(`backbone.layers.${i}.mixer.${name}`);
    const normed = reference.rms_norm(x, get(`backbone.layers.${i}.norm.weight`), eps);
    const y = letter === "M" ? mamba(config, normed, of)
      : letter === "*" ? attention(config, normed, of)
        : letter === "-" ? mlp(normed, of, "up_proj.weight", "down_proj.weight")
          : experts(config, normed, of);
    x = ndarray(x.shape, x.data.map((value, at) => value + y.data[at]!));
  });
  const D = config.hidden_size;
  const last = reference.rms_norm(ndarray([1, D], x.data.slice((L - 1) * D)), get("backbone.norm_f.weight"),
    eps);
  return centred(Array.from(reference.linear(last, get("lm_head.weight"), null).data));
}

/** Less their mean: what engines that only tell probabilities can be compared by. */
export function centred(values: readonly number[]): number[] {
  const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
  return values.map((value) => value - mean);
}

type Get = (name: string) => NdArray;

function columns(x: NdArray, from: number, shape: readonly number[]): NdArray {
  const width = x.shape.at(-1)!;
  const rows = x.data.length / width;
  const size = shape.reduce((a, b) => a * b, 1) / rows;
  return ndarray(shape, Float64Array.from(
    { length: rows * size }, (_, i) => x.data[Math.floor(i / size) * width + from + (i % size)]!));
}

function mamba(config: NemotronHConfig, x: NdArray, get: Get): NdArray {
  const { mamba_num_heads: H, mamba_head_dim: P, ssm_state_size: N, n_groups: G, chunk_size } = config;
  const L = x.shape[1]!;
  const [inner, state] = [H * P, G * N];
  const all = reference.linear(x, get("in_proj.weight"), null);
  const z = columns(all, 0, [1, L, inner]);
  const { data, shape: [C, , K] } = get("conv1d.weight");
  const [conv] = reference.causal_conv1d(
    columns(all, inner, [1, L, inner + 2 * state]), ndarray([C!, K!], data), get("conv1d.bias"), null, null);
  const dt = columns(all, 2 * inner + 2 * state, [1, L, H]);
  const options = { chunk_size, dt_limit: [0, Infinity] as const, initial_state: null, seq_idx: null };
  const [y] = reference.ssd_scan(
    columns(conv, 0, [1, L, H, P]), dt, get("A_log"), columns(conv, inner, [1, L, G, N]),
    columns(conv, inner + state, [1, L, G, N]), get("D"), get("dt_bias"), options);
  const gated = reference.gated_rms_norm(
    ndarray([1, L, inner], y.data), z, get("norm.weight"), G, config.layer_norm_epsilon);
  return reference.linear(gated, get("out_proj.weight"), null);
}

function attention(config: NemotronHConfig, x: NdArray, get: Get): NdArray {
  const { num_attention_heads: heads, num_key_value_heads: kv, head_dim: D } = config;
  const L = x.shape[1]!;
  const project = (name: string, count: number) =>
    ndarray([1, L, count, D], reference.linear(x, get(`${name}_proj.weight`), null).data);
  const y = reference.attention(
    project("q", heads), project("k", kv), project("v", kv), { scale: 1 / Math.sqrt(D) });
  return reference.linear(ndarray([1, L, heads * D], y.data), get("o_proj.weight"), null);
}

function mlp(x: NdArray, get: Get, up: string, down: string): NdArray {
  const h = reference.linear(x, get(up), null);
  return reference.linear(ndarray(h.shape, h.data.map((v) => Math.max(v, 0) ** 2)), get(down), null);
}

function experts(config: NemotronHConfig, x: NdArray, get: Get): NdArray {
  const { n_routed_experts: E, num_experts_per_tok: K, hidden_size: D } = config;
  const y = mlp(x, get, "shared_experts.up_proj.weight", "shared_experts.down_proj.weight");
  const logits = reference.linear(x, get("gate.weight"), null);
  const bias = get("gate.e_score_correction_bias").data;
  const [up, down] = [get("experts.up_proj"), get("experts.down_proj")];
  const one = ({ shape, data }: NdArray, e: number): NdArray => {
    const size = data.length / shape[0]!;
    return ndarray(shape.slice(1), data.slice(e * size, (e + 1) * size));
  };
  for (let t = 0; t < x.shape[1]!; t++) {
    const score = [...logits.data.subarray(t * E, (t + 1) * E)].map((v) => 1 / (1 + Math.exp(-v)));
    const chosen = score.map((_, e) => e).sort((a, b) => score[b]! + bias[b]! - score[a]! - bias[a]!).slice(0,
      K);
    const total = chosen.reduce((sum, e) => sum + score[e]!, 0);
    const row = ndarray([1, D], x.data.slice(t * D, (t + 1) * D));
    for (const e of chosen) {
      const part = mlp(row, (name) => one(name === "up" ? up : down, e), "up", "down");
      const weight = (config.routed_scaling_factor * score[e]!) / (total + 1e-20);
      for (let d = 0; d < D; d++) y.data[t * D + d]! += weight * part.data[d]!;
    }
  }
  return y;
}

/** The model as a GGUF file that llama.cpp loads as `nemotron_h` or `nemotron_h_moe`. */
export function hybridGguf(config: NemotronHConfig, weights: Weights): Uint8Array {
  const letters = [...config.hybrid_override_pattern];
  const isMoe = letters.includes("E");
  const inner = config.mamba_num_heads * config.mamba_head_dim;
  const tensors: GgufTensor[] = [];
  const add = (name: string, { shape, data }: Input, as = shape) => tensors.push({ name, shape: as, data });
  const matrix = (name: string, { shape, data }: Input) =>
    tensors.push({ name, shape, data: toBlocks(data, 4) });
  matrix("token_embd.weight", weights["backbone.embeddings.weight"]!);
  add("output_norm.weight", weights["backbone.norm_f.weight"]!);
  matrix("output.weight", weights["lm_head.weight"]!);
  letters.forEach((letter, i) => {
    const of = (name: string) => weights[`backbone.layers.${i}.mixer.${name}`]!;
    const at = `blk.${i}.`;
    add(`${at}attn_norm.weight`, weights[`backbone.layers.${i}.norm.weight`]!);
    if (letter === "M") {
      const { mamba_num_heads: H, n_groups: G } = config;
      matrix(`${at}ssm_in.weight`, of("in_proj.weight"));
      const conv = of("conv1d.weight");
      add(`${at}ssm_conv1d.weight`, conv, [conv.shape[0]!, conv.shape[2]!]);
      add(`${at}ssm_conv1d.bias`, of("conv1d.bias"));
      add(`${at}ssm_dt.bias`, of("dt_bias"));
      const decay = of("A_log");
      add(`${at}ssm_a`, { ...decay, data: decay.data.map((x) => -Math.exp(x)) }, [H, 1]);
      add(`${at}ssm_d`, of("D"), [H, 1]);
      add(`${at}ssm_norm.weight`, of("norm.weight"), [G, inner / G]);
      matrix(`${at}ssm_out.weight`, of("out_proj.weight"));
    } else if (letter === "*") {
      for (const [ours, theirs] of [["q", "q"], ["k", "k"], ["v", "v"], ["o", "output"]]) {
        matrix(`${at}attn_${theirs!}.weight`, of(`${ours!}_proj.weight`));
      }
    } else if (letter === "-") {
      for (const side of ["up", "down"]) matrix(`${at}ffn_${side}.weight`, of(`${side}_proj.weight`));
    } else {
      add(`${at}ffn_gate_inp.weight`, of("gate.weight"));
      add(`${at}exp_probs_b.bias`, of("gate.e_score_correction_bias"));
      for (const side of ["up", "down"]) {
        matrix(`${at}ffn_${side}_exps.weight`, of(`experts.${side}_proj`));
        matrix(`${at}ffn_${side}_shexp.weight`, of(`shared_experts.${side}_proj.weight`));
      }
    }
  });
  return encodeGguf(settings(config, isMoe ? "nemotron_h_moe" : "nemotron_h", inner), tensors);
}

function settings(config: NemotronHConfig, arch: string, inner: number): Record<string, Setting> {
  const letters = [...config.hybrid_override_pattern];
  const own: Record<string, Setting> = {
    vocab_size: config.vocab_size, context_length: config.max_position_embeddings,
    embedding_length: config.hidden_size, block_count: letters.length,
    feed_forward_length: letters.map((letter) =>
      letter === "-" ? config.intermediate_size as number
        : letter === "E" ? config.moe_intermediate_size : 0),
    "attention.head_count": config.num_attention_heads,
    "attention.head_count_kv": letters.map((letter) => (letter === "*" ? config.num_key_value_heads : 0)),
    "attention.key_length": config.head_dim, "attention.value_length": config.head_dim,
    "attention.layer_norm_epsilon": { float: config.layer_norm_epsilon },
    "attention.layer_norm_rms_epsilon": { float: config.layer_norm_epsilon },
    "rope.dimension_count": config.head_dim,
    "ssm.conv_kernel": config.conv_kernel, "ssm.state_size": config.ssm_state_size,
    "ssm.group_count": config.n_groups, "ssm.inner_size": inner,
    "ssm.time_step_rank": config.mamba_num_heads,
    ...(arch === "nemotron_h" ? {} : {
      expert_count: config.n_routed_experts, expert_used_count: config.num_experts_per_tok,
      expert_feed_forward_length: config.moe_intermediate_size, expert_shared_count: 1,
      expert_shared_feed_forward_length: config.moe_shared_expert_intermediate_size,
      expert_weights_norm: true, expert_weights_scale: { float: config.routed_scaling_factor },
    }),
  };
  const pieces = Array.from({ length: config.vocab_size }, (_, i) => SPECIAL[i] ?? textOf([i]));
  return {
    "general.architecture": arch, "general.name": "bench", "general.file_type": 2,
    "general.quantization_version": 2,
    ...Object.fromEntries(Object.entries(own).map(([key, value]) => [`${arch}.${key}`, value])),
    "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": pieces,
    "tokenizer.ggml.scores": Float32Array.from(pieces, (_, i) => -i),
    "tokenizer.ggml.token_type": pieces.map((_, i) => (i === 0 ? 2 : i < 3 ? 3 : 1)),
    "tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.add_bos_token": false, "tokenizer.ggml.add_space_prefix": false,
  };
}

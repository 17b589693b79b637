/**
 * The configuration of a Nemotron-H model: the published config.json, checked, with every default filled in.
 *
 * Keys keep their published names; `layerSpecs` and `mtpSpecs` make of them what each layer needs. Keys that
 * the model does not use (rope_theta, sliding_window, expand, hidden_dropout ...) are ignored.
 */
import { parseJson } from "../io/json.ts";
import type { RouterScore } from "../ops/router.ts";
import { ConfigError, FormatError } from "../tensor/errors.ts";
import { ConfigKeys, MAX_SIZE, asObject, show } from "./config_keys.ts";
import { KIND_OF_NAME, readChain } from "./layer_list.ts";
import type { BlockConfig, LayerKind } from "./layer_list.ts";

export { letterOf } from "./layer_list.ts";
export type { BlockConfig, LayerKind, LayerLetter } from "./layer_list.ts";

/** Sizes of one routed layer. `shared_size` is the width of the shared expert; 0: none. */
export interface MoESpec {
  readonly kind: "moe";
  readonly n_routed_experts: number;
  readonly num_experts_per_tok: number;
  readonly moe_intermediate_size: number;
  readonly moe_latent_size: number | null;
  readonly shared_size: number;
}

/** What one layer is. `dt_limit` bounds the step size after softplus; its upper end may be Infinity. */
export type LayerSpec =
  | { readonly kind: "mamba"; readonly dt_limit: readonly [number, number] }
  | { readonly kind: "attention" }
  | { readonly kind: "mlp"; readonly intermediate_size: number }
  | MoESpec;

export interface NemotronHConfig {
  readonly model_type: "nemotron_h" | "nemotron_h_puzzle";
  readonly vocab_size: number;
  readonly hidden_size: number;
  readonly num_hidden_layers: number;
  /** One letter per layer: M Mamba-2, * attention, - MLP, E mixture of experts. */
  readonly hybrid_override_pattern: string;
  readonly block_configs: readonly BlockConfig[] | null;
  readonly max_position_embeddings: number;

  readonly num_attention_heads: number;
  readonly num_key_value_heads: number;
  readonly head_dim: number;
  readonly attention_bias: boolean;

  readonly intermediate_size: number | readonly number[];
  readonly mlp_bias: boolean;
  readonly mlp_hidden_act: "relu2";

  readonly mamba_num_heads: number;
  readonly mamba_head_dim: number;
  readonly ssm_state_size: number;
  readonly n_groups: number;
  readonly conv_kernel: number;
  readonly chunk_size: number;
  readonly use_bias: boolean;
  readonly use_conv_bias: boolean;
  readonly mamba_hidden_act: "silu";
  readonly mamba_ssm_cache_dtype: "float32" | "float16" | "bfloat16";
  /** Range of the initial step sizes; no bound while running, unless `dt_min_clamp`. */
  readonly time_step_min: number;
  readonly time_step_max: number;
  readonly time_step_floor: number;
  /** Bounds of the step size after softplus; 1e30 and above are read as Infinity. */
  readonly time_step_limit: readonly [number, number];
  /** Also keep step sizes at or above time_step_min, as one published implementation does. */
  readonly dt_min_clamp: boolean;

  readonly n_routed_experts: number;
  readonly num_experts_per_tok: number;
  readonly moe_intermediate_size: number;
  readonly moe_latent_size: number | null;
  readonly n_shared_experts: number;
  readonly moe_shared_expert_intermediate_size: number;
  /** Whether the shared expert's output is multiplied by a sigmoid of its own of the token. */
  readonly shared_expert_gate: boolean;
  readonly n_group: number;
  readonly topk_group: number;
  /** How many of its best experts make a group's score. */
  readonly group_best: number;
  readonly scoring_func: RouterScore;
  /** Whether the correction bias is added to scores or to logits. */
  readonly router_choice: "score" | "logits";
  readonly norm_topk_prob: boolean;
  readonly routed_scaling_factor: number;

  /** 0 or 1: a head trained for several depths is still one block of weights. */
  readonly num_nextn_predict_layers: number;
  /** Layers of the prediction block; empty when there is none. */
  readonly mtp_hybrid_override_pattern: string;
  readonly mtp_block_configs: readonly BlockConfig[] | null;
  readonly mtp_n_routed_experts: number | null;

  readonly layer_norm_epsilon: number;
  readonly residual_in_fp32: boolean;
  readonly rescale_prenorm_residual: boolean;
  readonly initializer_range: number;
  readonly tie_word_embeddings: false;
  readonly num_logits_to_keep: number;
  readonly pad_token_id: number | null;
  readonly bos_token_id: number | null;
  readonly eos_token_ids: readonly number[];
  readonly torch_dtype: "float32" | "float16" | "bfloat16";
}

export interface ConfigOptions {
  /** Name for messages; default "config.json". */
  readonly what?: string;
  /** Sets `dt_min_clamp`; without it the key of that name decides, and without the key it is off. */
  readonly dt_min_clamp?: boolean;
}

/** The model family's rule. */
const GROUP_BEST = 2;
const SCORES = ["sigmoid", "softmax", "softmax_chosen", "sqrtsoftplus"] as const satisfies RouterScore[];
const DTYPES = ["float32", "float16", "bfloat16"] as const;
/** What Python's writers put where they mean "no limit". */
const NO_LIMIT = 1e30;

/**
 * Reads config.json: text, bytes, or an object of the same keys. Bare Infinity is accepted in text, and a
 * configuration nested under `llm_config` or `text_config` is unwrapped.
 * Throws ConfigError with one sentence: file, key, expected, found.
 */
export function parseConfig(
  input: string | Uint8Array | Readonly<Record<string, unknown>>,
  options: ConfigOptions = {},
): NemotronHConfig {
  const what = options.what ?? "config.json";
  const keys = new ConfigKeys(what, unwrap(readObject(input, what), what));
  const model_type = keys.choice("model_type", "nemotron_h", ["nemotron_h", "nemotron_h_puzzle"]);
  const chain = readChain(keys);
  const moe = readMoE(keys);
  const config: NemotronHConfig = {
    model_type,
    vocab_size: keys.integer("vocab_size", 131072),
    hidden_size: keys.integer("hidden_size", 4096),
    num_hidden_layers: keys.integer("num_hidden_layers", chain.pattern.length),
    hybrid_override_pattern: chain.pattern,
    block_configs: chain.blocks,
    max_position_embeddings: keys.integer("max_position_embeddings", 4096, 1, 2 ** 31 - 1),
    ...readAttention(keys),
    intermediate_size: readIntermediateSize(keys),
    mlp_bias: keys.boolean("mlp_bias", false),
    mlp_hidden_act: keys.choice("mlp_hidden_act", "relu2", ["relu2"]),
    ...readMamba(keys, options.dt_min_clamp),
    ...moe,
    num_nextn_predict_layers: chain.mtpPattern === "" ? 0 : 1,
    mtp_hybrid_override_pattern: chain.mtpPattern,
    mtp_block_configs: chain.mtpBlocks,
    mtp_n_routed_experts: keys.integerOrNull("mtp_n_routed_experts"),
    layer_norm_epsilon: keys.number("layer_norm_epsilon", 1e-5, 0, true),
    residual_in_fp32: keys.boolean("residual_in_fp32", false),
    rescale_prenorm_residual: keys.boolean("rescale_prenorm_residual", true),
    initializer_range: keys.number("initializer_range", 0.02, 0),
    tie_word_embeddings: untied(keys),
    num_logits_to_keep: keys.integer("num_logits_to_keep", 1),
    ...readTokenIds(keys),
    torch_dtype: keys.choice("torch_dtype", "bfloat16", DTYPES),
  };
  const layers = chain.pattern.length;
  if (config.num_hidden_layers !== layers) {
    keys.fail("num_hidden_layers", `${layers}, the length of the layer list`, config.num_hidden_layers);
  }
  checkLayers(keys, config);
  return config;
}

/** The layers of the chain, in order. */
export function layerSpecs(config: NemotronHConfig): readonly LayerSpec[] {
  let mlps = 0;
  return [...config.hybrid_override_pattern].map((letter, i) => {
    const size = config.intermediate_size;
    const width = typeof size === "number" ? size : (size[letter === "-" ? mlps++ : 0] ?? 0);
    return specOf(config, KIND_OF_NAME[letter]!, width, config.block_configs?.[i], config.n_routed_experts);
  });
}

/** The layers of the multi-token-prediction block, in order; none when the model has no such block. */
export function mtpSpecs(config: NemotronHConfig): readonly LayerSpec[] {
  const size = config.intermediate_size;
  const width = typeof size === "number" ? size : 0;
  const experts = config.mtp_n_routed_experts ?? config.n_routed_experts;
  return [...config.mtp_hybrid_override_pattern].map((letter, i) =>
    specOf(config, KIND_OF_NAME[letter]!, width, config.mtp_block_configs?.[i], experts));
}

/** The same model without its multi-token-prediction block. */
export function withoutMtp(config: NemotronHConfig): NemotronHConfig {
  return { ...config, num_nextn_predict_layers: 0, mtp_hybrid_override_pattern: "", mtp_block_configs: null };
}

/** Mamba-2 inner width: heads * headdim (never derived from `expand`). */
export function innerSize(config: NemotronHConfig): number {
  return config.mamba_num_heads * config.mamba_head_dim;
}

/** Channels of the convolution: inner + 2 * groups * state. */
export function convSize(config: NemotronHConfig): number {
  return innerSize(config) + 2 * config.n_groups * config.ssm_state_size;
}

/**
 * config.json text that parseConfig reads back to the same configuration and that other programs understand:
 * published keys only, except `dt_min_clamp` and what tells of routers of another kind, where they are used.
 */
export function serialiseConfig(config: NemotronHConfig): string {
  const { eos_token_ids: eos, time_step_limit: [low, high], ...rest } = config;
  const family = config.model_type === "nemotron_h" ? "NemotronH" : "NemotronHPuzzle";
  const entries: Record<string, unknown> = {
    architectures: [`${family}ForCausalLM`],
    ...rest,
    eos_token_id: eos.length === 1 ? eos[0] : eos,
  };
  // JSON has no Infinity; absent means no limit, and 1e308 is read as none.
  if (low > 0 || high !== Infinity) entries["time_step_limit"] = [low, high === Infinity ? 1e308 : high];
  if (!config.dt_min_clamp) delete entries["dt_min_clamp"];
  if (config.scoring_func === "sigmoid") delete entries["scoring_func"];
  if (config.router_choice === "score") delete entries["router_choice"];
  if (config.group_best === GROUP_BEST) delete entries["group_best"];
  if (!config.shared_expert_gate) delete entries["shared_expert_gate"];
  const optional = ["block_configs", "mtp_block_configs", "mtp_n_routed_experts", "moe_latent_size"] as const;
  for (const key of optional) if (config[key] === null) delete entries[key];
  if (config.mtp_hybrid_override_pattern === "") delete entries["mtp_hybrid_override_pattern"];
  return `${JSON.stringify(entries, null, 2)}\n`;
}

function readObject(
  input: string | Uint8Array | Readonly<Record<string, unknown>>, what: string,
): Readonly<Record<string, unknown>> {
  if (typeof input !== "string" && !(input instanceof Uint8Array)) return input;
  let value: unknown;
  try {
    value = parseJson(input, { what, nonFinite: true });
  } catch (error) {
    // The sentence already names the file, the line, the expected and the found.
    if (error instanceof FormatError) throw new ConfigError(error.message);
    throw error;
  }
  return asObject(value) ?? fail(what, "an object", value);
}

function fail(what: string, expected: string, found: unknown): never {
  throw new ConfigError(`${what}: expected ${expected}, found ${show(found)}`);
}

/** Multimodal releases keep the language model's configuration one level down. */
function unwrap(object: Readonly<Record<string, unknown>>, what: string): Readonly<Record<string, unknown>> {
  for (const key of ["llm_config", "text_config"]) {
    if (!Object.hasOwn(object, key) || object[key] === null) continue;
    if (typeof object["model_type"] === "string" && object["model_type"].startsWith("nemotron_h")) continue;
    return asObject(object[key]) ?? fail(`${what}: ${key}`, "an object", object[key]);
  }
  return object;
}

function untied(keys: ConfigKeys): false {
  if (!keys.boolean("tie_word_embeddings", false)) return false;
  return keys.fail("tie_word_embeddings", "false (a tied head is not supported)", true);
}

function readAttention(keys: ConfigKeys) {
  const heads = keys.integer("num_attention_heads", 32);
  // An explicit null means one key head per query head; without the key it is 8.
  const perHead = keys.isNull("num_key_value_heads");
  return {
    num_attention_heads: heads,
    num_key_value_heads: keys.integer("num_key_value_heads", perHead ? heads : 8),
    head_dim: keys.integer("head_dim", 128),
    attention_bias: keys.boolean("attention_bias", false),
  };
}

function readIntermediateSize(keys: ConfigKeys): number | readonly number[] {
  const value = keys.get("intermediate_size");
  if (!Array.isArray(value)) return keys.integer("intermediate_size", 21504);
  return value.map((size, i) => keys.checkInteger(`intermediate_size[${i}]`, size, 1, MAX_SIZE));
}

function readMamba(keys: ConfigKeys, clamp: boolean | undefined) {
  return {
    mamba_num_heads: keys.integer("mamba_num_heads", 128),
    mamba_head_dim: keys.integer("mamba_head_dim", 64),
    ssm_state_size: keys.integer("ssm_state_size", 128),
    n_groups: keys.integer("n_groups", 8),
    conv_kernel: keys.integer("conv_kernel", 4, 1, 64),
    chunk_size: keys.integer("chunk_size", 128),
    // Where both keys are present, the published implementation reads use_bias alone.
    use_bias: keys.has("use_bias") ? keys.boolean("use_bias", false) : keys.boolean("mamba_proj_bias", false),
    use_conv_bias: keys.boolean("use_conv_bias", true),
    mamba_hidden_act: keys.choice("mamba_hidden_act", "silu", ["silu"] as const),
    mamba_ssm_cache_dtype: keys.choice("mamba_ssm_cache_dtype", "float32", DTYPES),
    ...readTimeSteps(keys),
    dt_min_clamp: clamp ?? keys.boolean("dt_min_clamp", false),
  };
}

function readTimeSteps(keys: ConfigKeys) {
  const min = keys.number("time_step_min", 1e-3, 0, true);
  const max = keys.number("time_step_max", 0.1, 0, true);
  if (max < min) keys.fail("time_step_max", `at least time_step_min (${min})`, max);
  const limit = keys.list("time_step_limit") ?? [0, Infinity];
  const [low, high] = limit;
  const isRange = typeof low === "number" && typeof high === "number" && low >= 0 && low <= high;
  if (limit.length !== 2 || !isRange || low >= NO_LIMIT) {
    keys.fail("time_step_limit", "two numbers, 0 <= low <= high", limit);
  }
  const time_step_limit: readonly [number, number] = [low, high >= NO_LIMIT ? Infinity : high];
  const time_step_floor = keys.number("time_step_floor", 1e-4, 0, true);
  return { time_step_min: min, time_step_max: max, time_step_floor, time_step_limit };
}

function readMoE(keys: ConfigKeys) {
  return {
    n_routed_experts: keys.integer("n_routed_experts", 8, 0),
    num_experts_per_tok: keys.integer("num_experts_per_tok", 2, 0),
    moe_intermediate_size: keys.integer("moe_intermediate_size", 7688, 0),
    moe_latent_size: keys.integerOrNull("moe_latent_size"),
    n_shared_experts: keys.integer("n_shared_experts", 1, 0),
    moe_shared_expert_intermediate_size: keys.integer("moe_shared_expert_intermediate_size", 7688, 0),
    shared_expert_gate: keys.boolean("shared_expert_gate", false),
    n_group: keys.integer("n_group", 1),
    topk_group: keys.integer("topk_group", 1),
    group_best: keys.integer("group_best", GROUP_BEST),
    scoring_func: keys.choice("scoring_func", "sigmoid", SCORES),
    router_choice: keys.choice("router_choice", "score", ["score", "logits"] as const),
    norm_topk_prob: keys.boolean("norm_topk_prob", true),
    routed_scaling_factor: keys.number("routed_scaling_factor", 1, -Number.MAX_VALUE),
  };
}

function readTokenIds(keys: ConfigKeys) {
  const vocabulary = keys.integer("vocab_size", 131072);
  const one = (key: string, fallback: number): number | null => {
    if (keys.isNull(key)) return null;
    return keys.has(key) ? keys.integer(key, 0, 0, vocabulary - 1) : fallback < vocabulary ? fallback : null;
  };
  const eos = keys.get("eos_token_id");
  const ids = Array.isArray(eos)
    ? eos.map((id, i) => keys.checkInteger(`eos_token_id[${i}]`, id, 0, vocabulary - 1))
    : [one("eos_token_id", 2)].filter((id) => id !== null);
  return { pad_token_id: one("pad_token_id", 0), bos_token_id: one("bos_token_id", 1), eos_token_ids: ids };
}

function specOf(
  config: NemotronHConfig, kind: LayerKind, width: number, block: BlockConfig | undefined, experts: number,
): LayerSpec {
  switch (kind) {
    case "mamba": {
      const [low, high] = config.time_step_limit;
      return { kind, dt_limit: [config.dt_min_clamp ? Math.max(low, config.time_step_min) : low, high] };
    }
    case "attention":
      return { kind };
    case "mlp":
      return { kind, intermediate_size: block?.intermediate_size ?? width };
    case "moe":
      return {
        kind,
        n_routed_experts: block?.n_routed_experts ?? experts,
        num_experts_per_tok: block?.num_experts_per_tok ?? config.num_experts_per_tok,
        moe_intermediate_size: block?.moe_intermediate_size ?? config.moe_intermediate_size,
        moe_latent_size: block?.moe_latent_size ?? config.moe_latent_size,
        shared_size: block?.moe_shared_expert_intermediate_size ?? config.moe_shared_expert_intermediate_size,
      };
  }
}

/** Relations between keys, checked only for the kinds of layers that the model has. */
function checkLayers(keys: ConfigKeys, config: NemotronHConfig): void {
  const { hybrid_override_pattern: pattern, intermediate_size: size } = config;
  const letters = pattern + config.mtp_hybrid_override_pattern;
  const mlps = pattern.split("-").length - 1;
  if (typeof size !== "number" && size.length !== mlps) {
    keys.fail("intermediate_size", `one entry for each of the ${mlps} MLP layers`, size.length);
  }
  if (mtpSpecs(config).some((spec) => spec.kind === "mlp" && spec.intermediate_size === 0)) {
    keys.fail("intermediate_size", "one number, for the MLP layers of the prediction block", size);
  }
  if (letters.includes("*")) {
    const { num_attention_heads: heads, num_key_value_heads: kv } = config;
    keys.divides("num_key_value_heads", kv, "num_attention_heads", heads);
    checkProduct(keys, "num_attention_heads * head_dim", heads, config.head_dim);
  }
  if (letters.includes("M")) {
    const { mamba_num_heads: heads, n_groups: groups, ssm_state_size: state } = config;
    keys.divides("n_groups", groups, "mamba_num_heads", heads);
    checkProduct(keys, "mamba_num_heads * mamba_head_dim", heads, config.mamba_head_dim);
    checkProduct(keys, "n_groups * ssm_state_size", groups, state);
    const rows = 2 * innerSize(config) + 2 * groups * state + heads;
    if (rows > MAX_SIZE) keys.fail("mamba_num_heads", `at most ${MAX_SIZE} rows of in_proj`, rows);
  }
  const routed = [...layerSpecs(config), ...mtpSpecs(config)].filter((spec) => spec.kind === "moe");
  for (const spec of routed) checkMoE(keys, config, spec);
  const isShared = routed.length === 0 || routed.some(({ shared_size }) => shared_size > 0);
  if (config.shared_expert_gate && !isShared) {
    keys.fail("shared_expert_gate", "false where no layer has a shared expert", true);
  }
}

function checkProduct(keys: ConfigKeys, name: string, a: number, b: number): void {
  // Divide instead of multiplying: nothing is computed from sizes that are out of range.
  if (a > Math.floor(MAX_SIZE / b)) keys.fail(name, `at most ${MAX_SIZE}`, `${a} * ${b}`);
}

function checkMoE(keys: ConfigKeys, config: NemotronHConfig, spec: MoESpec): void {
  const { n_group: groups, topk_group: kept } = config;
  const { n_routed_experts: experts, num_experts_per_tok: chosen } = spec;
  keys.checkInteger("n_routed_experts", experts, 1, MAX_SIZE);
  keys.checkInteger("moe_intermediate_size", spec.moe_intermediate_size, 1, MAX_SIZE);
  keys.divides("n_group", groups, "n_routed_experts", experts);
  keys.checkInteger("topk_group", kept, 1, groups);
  if (groups > 1 && experts / groups < config.group_best) {
    const expected = `groups of at least group_best (${config.group_best}) of the ${experts} experts`;
    keys.fail("n_group", expected, groups);
  }
  keys.checkInteger("num_experts_per_tok", chosen, 1, (experts / groups) * kept);
  if (chosen === 1 && config.scoring_func === "softmax_chosen") {
    keys.fail("num_experts_per_tok", "at least 2 for scoring_func softmax_chosen, whose weight is 1", chosen);
  }
  const matrix = spec.moe_intermediate_size * (spec.moe_latent_size ?? config.hidden_size);
  if (experts > Math.floor(Number.MAX_SAFE_INTEGER / matrix)) {
    keys.fail("n_routed_experts", "at most 2^53 - 1 weights in a layer", `${experts} * ${matrix}`);
  }
}

/**
 * Configurations by name: the published Nemotron-H, Nemotron Nano 2 and Nemotron 3 models with the sizes of
 * their config.json files, and small ones that train in minutes with the byte tokenizer.
 */
import { BYTE_VOCABULARY, EOS_BYTE } from "../text/byte_tokenizer.ts";
import { ConfigError } from "../tensor/errors.ts";
import { parseConfig } from "./config.ts";
import type { NemotronHConfig } from "./config.ts";

type Keys = Readonly<Record<string, unknown>>;

const NEMOTRON_H_8B = {
  hybrid_override_pattern: "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-", hidden_size: 4096,
  num_attention_heads: 32, num_key_value_heads: 8, mamba_num_heads: 128, mamba_head_dim: 64,
  ssm_state_size: 128, intermediate_size: 21504, max_position_embeddings: 8192,
};
const NEMOTRON_H_47B = {
  hybrid_override_pattern: "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-"
    + "M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-",
  hidden_size: 8192, num_attention_heads: 64, num_key_value_heads: 8, mamba_num_heads: 256,
  mamba_head_dim: 64, ssm_state_size: 256, intermediate_size: 30720, max_position_embeddings: 8192,
};
const NANO_12B_V2 = {
  hybrid_override_pattern: "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-",
  hidden_size: 5120, num_attention_heads: 40, num_key_value_heads: 8, mamba_num_heads: 128,
  mamba_head_dim: 80, ssm_state_size: 128, intermediate_size: 20480, max_position_embeddings: 131072,
};
const NANO_30B = {
  hybrid_override_pattern: "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME", hidden_size: 2688,
  num_attention_heads: 32, num_key_value_heads: 2, mamba_num_heads: 64, mamba_head_dim: 64,
  ssm_state_size: 128, intermediate_size: 1856, max_position_embeddings: 262144, n_routed_experts: 128,
  num_experts_per_tok: 6, moe_intermediate_size: 1856, moe_shared_expert_intermediate_size: 3712,
  routed_scaling_factor: 2.5,
};
const SUPER_120B = {
  hybrid_override_pattern: "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*"
    + "EMEMEMEMEM*EMEMEMEM*EMEMEMEME",
  hidden_size: 4096, num_attention_heads: 32, num_key_value_heads: 2, mamba_num_heads: 128,
  mamba_head_dim: 64, ssm_state_size: 128, intermediate_size: 2688, max_position_embeddings: 262144,
  n_routed_experts: 512, num_experts_per_tok: 22, moe_intermediate_size: 2688,
  moe_shared_expert_intermediate_size: 5376, moe_latent_size: 1024, routed_scaling_factor: 5,
  num_nextn_predict_layers: 1,
};

/** Bytes, the end of a document, and three ids that never occur: a multiple of 4 suits vector loads. */
const BYTES = {
  vocab_size: BYTE_VOCABULARY + 3, bos_token_id: null, eos_token_id: EOS_BYTE, pad_token_id: EOS_BYTE,
  torch_dtype: "float32",
};
const TOY = {
  ...BYTES, hidden_size: 128, num_attention_heads: 4, num_key_value_heads: 2, head_dim: 32,
  mamba_num_heads: 8, mamba_head_dim: 32, ssm_state_size: 32, n_groups: 2, chunk_size: 64,
  intermediate_size: 512,
};
const TOY_MOE = {
  ...TOY, hybrid_override_pattern: "MEMEM*EME", n_routed_experts: 16, num_experts_per_tok: 4,
  moe_intermediate_size: 64, moe_shared_expert_intermediate_size: 128, moe_latent_size: 64,
  routed_scaling_factor: 2.5,
};

const PRESETS: Readonly<Record<string, Keys>> = {
  "nemotron-h-4b": { ...NEMOTRON_H_8B, hidden_size: 3072, mamba_num_heads: 112, intermediate_size: 12288 },
  "nemotron-h-8b": NEMOTRON_H_8B,
  "nemotron-h-47b": NEMOTRON_H_47B,
  "nemotron-h-56b": {
    ...NEMOTRON_H_47B, intermediate_size: 32768,
    hybrid_override_pattern: `M-M-M-M*-${"M-M-M-M-M*-".repeat(9)}M-M-M-M-M-`,
  },
  "nemotron-nano-9b-v2": {
    ...NANO_12B_V2, hidden_size: 4480, intermediate_size: 15680, pad_token_id: 12,
    hybrid_override_pattern: "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
  },
  "nemotron-nano-12b-v2": NANO_12B_V2,
  "nemotron-3-nano-4b": {
    ...NANO_12B_V2, hidden_size: 3136, mamba_num_heads: 96, intermediate_size: 12544, chunk_size: 256,
    max_position_embeddings: 262144,
    hybrid_override_pattern: "M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-",
  },
  "nemotron-3-nano-30b-a3b": NANO_30B,
  "nemotron-3.5-lightning-30b-a3b": {
    ...NANO_30B, max_position_embeddings: 1048576, num_nextn_predict_layers: 1,
  },
  "nemotron-3-super-120b-a12b": SUPER_120B,
  "nemotron-3-ultra-550b-a55b": {
    ...SUPER_120B, hidden_size: 8192, num_attention_heads: 64, mamba_num_heads: 256,
    intermediate_size: 5120, moe_intermediate_size: 5120, moe_shared_expert_intermediate_size: 10240,
    moe_latent_size: 2048,
    hybrid_override_pattern: "MEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*"
      + "EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
  },
  unit: {
    hybrid_override_pattern: "ME*-M", vocab_size: 32, hidden_size: 16, num_attention_heads: 4,
    num_key_value_heads: 2, head_dim: 8, mamba_num_heads: 4, mamba_head_dim: 8, ssm_state_size: 8,
    n_groups: 2, chunk_size: 4, intermediate_size: 24, n_routed_experts: 8, num_experts_per_tok: 3,
    moe_intermediate_size: 12, moe_shared_expert_intermediate_size: 20, moe_latent_size: 8,
    routed_scaling_factor: 2.5, num_nextn_predict_layers: 1, torch_dtype: "float32",
  },
  "toy-dense": { ...TOY, hybrid_override_pattern: "M-M*-M-" },
  "toy-moe": TOY_MOE,
  // Sized so that it learns more than a trigram model of the same text within minutes on two CPU cores.
  tiny: {
    ...BYTES, hybrid_override_pattern: "M*-ME", hidden_size: 64, num_attention_heads: 4,
    num_key_value_heads: 2, head_dim: 16, mamba_num_heads: 8, mamba_head_dim: 16, ssm_state_size: 16,
    n_groups: 2, chunk_size: 32, intermediate_size: 192, n_routed_experts: 8, num_experts_per_tok: 2,
    moe_intermediate_size: 64, moe_shared_expert_intermediate_size: 64, moe_latent_size: 32,
    routed_scaling_factor: 2.5, num_nextn_predict_layers: 1, initializer_range: 0.05,
  },
};

/** Names of all presets: published models first, then the small ones. */
export function presetNames(): string[] {
  return Object.keys(PRESETS);
}

/** The configuration of that name. Throws ConfigError with the names there are. */
export function preset(name: string): NemotronHConfig {
  if (!Object.hasOwn(PRESETS, name)) {
    throw new ConfigError(`preset: expected one of ${presetNames().join(", ")}, found "${name}"`);
  }
  return parseConfig(PRESETS[name]!, { what: name });
}

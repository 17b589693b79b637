import { readFileSync, readdirSync } from "node:fs";
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { convSize, innerSize, layerSpecs, letterOf, mtpSpecs, parseConfig, serialiseConfig, withoutMtp } from
  "../../src/models/config.ts";
import { preset, presetNames } from "../../src/models/presets.ts";
import { ConfigError } from "../../src/tensor/errors.ts";

type Keys = Record<string, unknown>;

const golden = new URL("../fixtures/golden/", import.meta.url);

const SMALL = {
  hybrid_override_pattern: "ME*-M", vocab_size: 32, hidden_size: 16, num_attention_heads: 4,
  num_key_value_heads: 2, head_dim: 8, mamba_num_heads: 4, mamba_head_dim: 8, ssm_state_size: 8, n_groups: 2,
  chunk_size: 4, intermediate_size: 24, n_routed_experts: 8, num_experts_per_tok: 3,
  moe_intermediate_size: 12,
  moe_shared_expert_intermediate_size: 20,
};
const small = (keys: Keys = {}) => parseConfig({ ...SMALL, ...keys });

describe("defaults and aliases", () => {
  test("absent keys have the published defaults", () => {
    const config = parseConfig({ hybrid_override_pattern: "M-" });
    expect(config).toMatchObject({
      model_type: "nemotron_h", vocab_size: 131072, hidden_size: 4096, num_hidden_layers: 2,
      num_attention_heads: 32, num_key_value_heads: 8, head_dim: 128, intermediate_size: 21504,
      mamba_num_heads: 128, mamba_head_dim: 64, ssm_state_size: 128, n_groups: 8, conv_kernel: 4,
      chunk_size: 128,
      use_conv_bias: true, use_bias: false, mlp_bias: false, attention_bias: false,
      time_step_min: 1e-3, time_step_max: 0.1, time_step_floor: 1e-4, time_step_limit: [0, Infinity],
      layer_norm_epsilon: 1e-5, n_routed_experts: 8, num_experts_per_tok: 2, moe_intermediate_size: 7688,
      moe_shared_expert_intermediate_size: 7688, moe_latent_size: null, routed_scaling_factor: 1,
      norm_topk_prob: true, n_group: 1, topk_group: 1, num_nextn_predict_layers: 0,
      mtp_hybrid_override_pattern: "", tie_word_embeddings: false, max_position_embeddings: 4096,
      pad_token_id: 0, bos_token_id: 1, eos_token_ids: [2], torch_dtype: "bfloat16", dt_min_clamp: false,
      mamba_ssm_cache_dtype: "float32", residual_in_fp32: false, rescale_prenorm_residual: true,
    });
    expect([innerSize(config), convSize(config)]).toEqual([8192, 10240]);
  });

  test.each<[string, string, unknown]>([
    ["attention_head_dim", "head_dim", 16],
    ["mamba_n_groups", "n_groups", 4],
    ["mamba_d_conv", "conv_kernel", 3],
    ["mamba_chunk_size", "chunk_size", 64],
    ["mamba_conv_bias", "use_conv_bias", false],
    ["mamba_dt_min", "time_step_min", 0.01],
    ["mamba_dt_max", "time_step_max", 0.5],
    ["mamba_dt_init_floor", "time_step_floor", 1e-3],
    ["mamba_dt_limit", "time_step_limit", [0.5, 2]],
    ["norm_eps", "layer_norm_epsilon", 1e-6],
    ["rms_norm_eps", "layer_norm_epsilon", 1e-6],
    ["num_local_experts", "n_routed_experts", 4],
    ["dtype", "torch_dtype", "float32"],
  ])("%s means %s", (alias, key, value) => {
    expect(parseConfig({ hybrid_override_pattern: "ME*", [alias]: value })).toMatchObject({ [key]: value });
    const both = { hybrid_override_pattern: "M", [alias]: value, [key]: value };
    expect(parseConfig(both)).toMatchObject({ [key]: value });
  });

  test("null is absent; two spellings must agree", () => {
    expect(parseConfig({ hybrid_override_pattern: "M", n_groups: null, mamba_n_groups: 4 }).n_groups).toBe(4);
    expect(small({ num_key_value_heads: null }).num_key_value_heads).toBe(4);
    expect(() => small({ attention_head_dim: 16 })).toThrow(
      "config.json: attention_head_dim: expected the same as head_dim (8), found 16",
    );
  });

  test("use_bias speaks for the Mamba-2 projections; mamba_proj_bias only where it is absent", () => {
    expect(small({ use_bias: true, mamba_proj_bias: false }).use_bias).toBe(true);
    expect(small({ use_bias: false, mamba_proj_bias: true }).use_bias).toBe(false);
    expect(small({ mamba_proj_bias: true }).use_bias).toBe(true);
  });

  test("keys that the model does not use change nothing", () => {
    const unused = { rope_theta: 1e4, sliding_window: null, expand: 2, attention_dropout: 0.1,
      quantization_config: {} };
    expect(small(unused)).toEqual(small());
  });

  test("token ids: numbers, lists, null", () => {
    expect(small({ eos_token_id: [2, 11] }).eos_token_ids).toEqual([2, 11]);
    expect(small({ eos_token_id: null, bos_token_id: null, pad_token_id: null })).toMatchObject({
      eos_token_ids: [], bos_token_id: null, pad_token_id: null,
    });
    expect(() => small({ eos_token_id: 32 })).toThrow(
      /eos_token_id: expected an integer from 0 to 31, found 32/,
    );
    expect(() => small({ eos_token_id: [2, -1] })).toThrow(/eos_token_id\[1\]/);
  });
});

describe("text", () => {
  test("Infinity, limits of 1e30 and more, and a nested configuration", () => {
    const limit = (text: string) =>
      parseConfig(`{"hybrid_override_pattern": "M", "time_step_limit": ${text}}`).time_step_limit;
    expect(limit("[0.0, Infinity]")).toEqual([0, Infinity]);
    expect(limit("[0.0, 1e+308]")).toEqual([0, Infinity]);
    expect(limit("[0.001, 100.0]")).toEqual([0.001, 100]);
    const nested = { model_type: "NemotronH_Omni", vision_config: {}, llm_config: { ...SMALL } };
    expect(parseConfig(JSON.stringify(nested))).toEqual(small());
    expect(parseConfig({ text_config: SMALL })).toEqual(small());
    expect(parseConfig(new TextEncoder().encode(JSON.stringify(SMALL)))).toEqual(small());
  });

  test.each<[string, string, RegExp]>([
    ["broken", "{", /^my\.json: line 1, column 2: expected a key in double quotes/],
    ["a key twice", '{"hidden_size": 1, "hidden_size": 2}', /each key once, found "hidden_size"/],
    ["a list", "[]", /^my\.json: expected an object, found \[\]/],
    ["a nested list", '{"llm_config": []}', /^my\.json: llm_config: expected an object/],
  ])("%s", (_, text, message) => {
    expect(() => parseConfig(text, { what: "my.json" })).toThrow(ConfigError);
    expect(() => parseConfig(text, { what: "my.json" })).toThrow(message);
  });

  test("any damaged text gives a configuration or a ConfigError", () => {
    const text = JSON.stringify(SMALL);
    const put = fc.constantFrom("[", "{", '"', ",", ":", "-", "0", "9e9", "null", "Infinity", "");
    fc.assert(fc.property(fc.nat(text.length), fc.nat(6), put, (at, drop, insert) => {
      try {
        parseConfig(text.slice(0, at) + insert + text.slice(at + drop));
      } catch (error) {
        expect(error).toBeInstanceOf(ConfigError);
      }
    }), { numRuns: 2000 });
  });
});

describe("layer lists", () => {
  const names = ["mamba", "moe", "attention", "mlp", "mamba"];

  test("a string, a list of names of either kind, or objects", () => {
    const { hybrid_override_pattern: pattern, ...rest } = SMALL;
    const native = ["linear_attention", "moe", "full_attention", "mlp", "linear_attention"];
    const blocks = names.map((block_type) => ({ block_type }));
    for (const keys of [{ layers_block_type: names }, { layer_types: native }, { block_configs: blocks },
      { layers_block_type: names, hybrid_override_pattern: pattern, num_hidden_layers: 5 },
      { hybrid_override_pattern: "ME|*-|M" }]) {
      expect(parseConfig({ ...rest, ...keys })).toMatchObject(
        { hybrid_override_pattern: pattern, num_hidden_layers: 5 },
      );
    }
    expect(layerSpecs(small()).map(({ kind }) => kind)).toEqual(names);
    expect(layerSpecs(small()).map(({ kind }) => letterOf(kind)).join("")).toBe("ME*-M");
  });

  test.each<[Keys, string]>([
    [{ hybrid_override_pattern: "ME*X" },
      'hybrid_override_pattern: expected M, *, - or E at position 3, found "X"'],
    [{ hybrid_override_pattern: "MG" }, 'at position 1, found "G" (gated delta-net, which is not supported)'],
    [{ hybrid_override_pattern: "D*" },
      'at position 0, found "D" (sparse attention, which is not supported)'],
    [{ hybrid_override_pattern: "M+" }, '"+" (multi-head latent attention, which is not supported)'],
    [{ hybrid_override_pattern: "m" }, 'at position 0, found "m"'],
    [{ hybrid_override_pattern: 5 }, "expected a string of the letters M * - E, found 5"],
    [{ hybrid_override_pattern: "" }, "expected a layer list here or in layers_block_type"],
    [{ hybrid_override_pattern: "M".repeat(5000) }, "expected at most 4096 layers, found 5000"],
    [{ layers_block_type: ["mamba"] },
      "hybrid_override_pattern: expected the layers of layers_block_type, M, found"],
    [{ layers_block_type: ["mamba", "conv"] },
      'layers_block_type[1]: expected mamba, attention, mlp or moe, found "conv"'],
    [{ layers_block_type: "mamba" }, 'layers_block_type: expected a list, found "mamba"'],
    [{ num_hidden_layers: 4 }, "num_hidden_layers: expected 5, the length of the layer list, found 4"],
    [{ block_configs: [{ block_type: "mamba" }, 7] },
      "block_configs[1]: expected an object with block_type, found 7"],
    [{ block_configs: [{}] },
      "block_configs[0].block_type: expected mamba, attention, mlp or moe, found undefined"],
  ])("%j", (keys, message) => {
    expect(() => small(keys)).toThrow(ConfigError);
    expect(() => small(keys)).toThrow(message);
  });

  test("no layer list at all", () => {
    expect(() => parseConfig({})).toThrow("config.json: hybrid_override_pattern: expected a layer list");
  });

  test("sizes of single layers", () => {
    const config = parseConfig({
      ...SMALL, model_type: "nemotron_h_puzzle", num_hidden_layers: null, ssm_state_size: 96,
      hybrid_override_pattern: undefined,
      block_configs: [
        { block_type: "mamba" },
        { block_type: "moe", n_routed_experts: 4, num_experts_per_tok: 2, moe_intermediate_size: 6,
          moe_latent_size: 5 },
        { block_type: "moe", moe_shared_expert_intermediate_size: 0 },
        { block_type: "mlp", intermediate_size: 7 },
        { block_type: "attention", hidden_size: 16, num_key_value_heads: null },
      ],
      num_nextn_predict_layers: 1,
      mtp_block_configs: [{ block_type: "attention" }, { block_type: "moe", num_experts_per_tok: 1 }],
      mtp_n_routed_experts: 2,
    });
    expect(layerSpecs(config)).toEqual([
      { kind: "mamba", dt_limit: [0, Infinity] },
      { kind: "moe", n_routed_experts: 4, num_experts_per_tok: 2, moe_intermediate_size: 6,
        moe_latent_size: 5,
        shared_size: 20 },
      { kind: "moe", n_routed_experts: 8, num_experts_per_tok: 3, moe_intermediate_size: 12,
        moe_latent_size: null,
        shared_size: 0 },
      { kind: "mlp", intermediate_size: 7 },
      { kind: "attention" },
    ]);
    expect(mtpSpecs(config)[1]).toMatchObject({ n_routed_experts: 2, num_experts_per_tok: 1 });
    expect(parseConfig(serialiseConfig(config))).toEqual(config);
    expect(() => small({ block_configs: [{ block_type: "mamba", hidden_size: 8 }] })).toThrow(
      "config.json: block_configs[0]: hidden_size: expected the model's own value (16), found 8",
    );
  });

  test("one MLP width for all, or one for each", () => {
    const keys = { hybrid_override_pattern: "-M-", intermediate_size: [7, 9] };
    expect(layerSpecs(small(keys)).filter(({ kind }) => kind === "mlp")).toEqual([
      { kind: "mlp", intermediate_size: 7 }, { kind: "mlp", intermediate_size: 9 },
    ]);
    expect(() => small({ ...keys, intermediate_size: [7] })).toThrow(
      /one entry for each of the 2 MLP layers, found 1/,
    );
    expect(() => small({ ...keys, intermediate_size: [7, 0] })).toThrow(
      /intermediate_size\[1\]: expected an integer/,
    );
    expect(() => small({ ...keys, num_nextn_predict_layers: 1, mtp_hybrid_override_pattern: "-" })).toThrow(
      /one number, for the MLP layers of the prediction block/,
    );
  });
});

describe("multi-token prediction", () => {
  test("its layers: the default, a string, a list, or after the chain", () => {
    const pattern = (keys: Keys) => small(keys).mtp_hybrid_override_pattern;
    expect(pattern({})).toBe("");
    expect(pattern({ mtp_hybrid_override_pattern: "*-" })).toBe("");
    expect(pattern({ num_nextn_predict_layers: 1 })).toBe("*E");
    expect(pattern({ num_nextn_predict_layers: 1, mtp_hybrid_override_pattern: "*-" })).toBe("*-");
    expect(pattern({ num_nextn_predict_layers: 1, mtp_layers_block_type: ["full_attention", "mlp"] })).toBe(
      "*-",
    );
    expect(pattern({ hybrid_override_pattern: "ME*-M/*E/*E" })).toBe("*E");
    expect(mtpSpecs(small({ num_nextn_predict_layers: 1 })).map(({ kind }) => kind)).toEqual(
      ["attention", "moe"],
    );
    expect(mtpSpecs(withoutMtp(small({ num_nextn_predict_layers: 1 })))).toEqual([]);
  });

  test.each<[Keys, string]>([
    [{ hybrid_override_pattern: "M/*E/*-" }, "hybrid_override_pattern after /: expected the layers of"],
    [{ num_nextn_predict_layers: 2 }, "num_nextn_predict_layers: expected an integer from 0 to 1, found 2"],
    [{ mtp_hybrid_override_pattern: "*E/*E" },
      "mtp_hybrid_override_pattern: expected the layers of one block"],
    [{ num_nextn_predict_layers: 1, mtp_hybrid_override_pattern: "" }, "expected at least one layer"],
    [{ mtp_hybrid_override_pattern: "*E", mtp_layers_block_type: ["moe"] },
      "mtp_hybrid_override_pattern: expected the layers of mtp_layers_block_type, E, found \"*E\""],
    [{ mtp_hybrid_override_pattern: "*Q" }, 'expected M, *, - or E at position 1, found "Q"'],
  ])("%j", (keys, message) => {
    expect(() => small(keys)).toThrow(message);
  });
});

describe("step size bounds", () => {
  const bounds = (keys: Keys, dt_min_clamp?: boolean) => {
    const config = parseConfig({ ...SMALL, ...keys }, dt_min_clamp === undefined ? {} : { dt_min_clamp });
    const [spec] = layerSpecs(config);
    return spec?.kind === "mamba" ? spec.dt_limit : undefined;
  };
  test("time_step_min bounds nothing unless asked for", () => {
    expect(bounds({ time_step_min: 0.01 })).toEqual([0, Infinity]);
    expect(bounds({ time_step_min: 0.01, dt_min_clamp: true })).toEqual([0.01, Infinity]);
    expect(bounds({ time_step_min: 0.01 }, true)).toEqual([0.01, Infinity]);
    expect(bounds({ time_step_min: 0.01, dt_min_clamp: true }, false)).toEqual([0, Infinity]);
    expect(bounds({ time_step_min: 0.01, time_step_limit: [0.02, 3] }, true)).toEqual([0.02, 3]);
  });
});

describe("values out of range", () => {
  test.each<[Keys, string]>([
    [{ model_type: "llama" }, 'model_type: expected one of nemotron_h, nemotron_h_puzzle, found "llama"'],
    [{ hidden_size: 0 }, "hidden_size: expected an integer from 1 to 67108864, found 0"],
    [{ hidden_size: 2 ** 31 }, "found 2147483648"],
    [{ hidden_size: 16.5 }, "found 16.5"],
    [{ hidden_size: "16" }, 'found "16"'],
    [{ hidden_size: NaN }, "found NaN"],
    [{ use_conv_bias: 1 }, "use_conv_bias: expected true or false, found 1"],
    [{ mlp_hidden_act: "silu" }, 'mlp_hidden_act: expected "relu2", found "silu"'],
    [{ mamba_hidden_act: "gelu" }, 'mamba_hidden_act: expected "silu", found "gelu"'],
    [{ tie_word_embeddings: true },
      "tie_word_embeddings: expected false (a tied head is not supported), found true"],
    [{ layer_norm_epsilon: 0 }, "layer_norm_epsilon: expected a number above 0, found 0"],
    [{ layer_norm_epsilon: Infinity }, "found Infinity"],
    [{ initializer_range: -1 }, "initializer_range: expected a number from 0, found -1"],
    [{ conv_kernel: 100 }, "conv_kernel: expected an integer from 1 to 64"],
    [{ time_step_min: 0.2 }, "time_step_max: expected at least time_step_min (0.2), found 0.1"],
    [{ time_step_limit: [2, 1] }, "time_step_limit: expected two numbers, 0 <= low <= high, found [2,1]"],
    [{ time_step_limit: [0] }, "found [0]"],
    [{ time_step_limit: [0, "x"] }, 'found [0,"x"]'],
    [{ time_step_limit: [1e300, 1e300] }, "time_step_limit"],
    [{ num_key_value_heads: 3 },
      "num_attention_heads: expected a multiple of num_key_value_heads (3), found 4"],
    [{ n_groups: 3 }, "mamba_num_heads: expected a multiple of n_groups (3), found 4"],
    [{ mamba_num_heads: 2 ** 20, mamba_head_dim: 2 ** 20 },
      "mamba_num_heads * mamba_head_dim: expected at most 67108864"],
    [{ n_groups: 2, ssm_state_size: 2 ** 26 }, "n_groups * ssm_state_size: expected at most 67108864"],
    [{ mamba_num_heads: 2 ** 22, mamba_head_dim: 16 }, "rows of in_proj"],
    [{ num_attention_heads: 2 ** 20, head_dim: 2 ** 20 }, "num_attention_heads * head_dim: expected at most"],
    [{ n_group: 3 }, "n_routed_experts: expected a multiple of n_group (3), found 8"],
    [{ n_group: 8 }, "n_group: expected groups of at least group_best (2) of the 8 experts, found 8"],
    [{ n_group: 4, group_best: 3 }, "n_group: expected groups of at least group_best (3) of the 8 experts"],
    [{ scoring_func: "tanh" },
      "scoring_func: expected one of sigmoid, softmax, softmax_chosen, sqrtsoftplus"],
    [{ scoring_func: "softmax_chosen", num_experts_per_tok: 1 },
      "num_experts_per_tok: expected at least 2 for scoring_func softmax_chosen, whose weight is 1, found 1"],
    [
      { shared_expert_gate: true, moe_shared_expert_intermediate_size: 0 },
      "shared_expert_gate: expected false where no layer has a shared expert, found true",
    ],
    [{ router_choice: "both" }, "router_choice: expected one of score, logits"],
    [{ n_group: 2, topk_group: 3 }, "topk_group: expected an integer from 1 to 2, found 3"],
    [{ num_experts_per_tok: 9 }, "num_experts_per_tok: expected an integer from 1 to 8, found 9"],
    [{ n_group: 4, topk_group: 1 }, "num_experts_per_tok: expected an integer from 1 to 2, found 3"],
    [{ n_routed_experts: 0 }, "n_routed_experts: expected an integer from 1"],
    [{ moe_intermediate_size: 0 }, "moe_intermediate_size: expected an integer from 1"],
    [{ n_routed_experts: 2 ** 26, moe_intermediate_size: 2 ** 26 }, "at most 2^53 - 1 weights in a layer"],
  ])("%j", (keys, message) => {
    expect(() => small(keys)).toThrow(ConfigError);
    expect(() => small(keys)).toThrow(message);
  });

  test("sizes of kinds of layers that the model lacks are not looked at", () => {
    const keys = { n_group: 3, n_routed_experts: 7, num_key_value_heads: 3 };
    expect(small({ ...keys, hybrid_override_pattern: "M-" }).hybrid_override_pattern).toBe("M-");
    expect(small({ n_groups: 3, hybrid_override_pattern: "*E" }).n_groups).toBe(3);
  });
});

describe("writing", () => {
  test.each(presetNames())("%s is read back as it was", (name) => {
    expect(parseConfig(serialiseConfig(preset(name)))).toEqual(preset(name));
  });

  test("routers of another kind are read back as they were", () => {
    const groups = { n_group: 2, topk_group: 2, group_best: 1 };
    const keys =
      { scoring_func: "softmax", router_choice: "logits", shared_expert_gate: true, ...groups };
    const config = small(keys);
    expect(config).toMatchObject(keys);
    expect(JSON.parse(serialiseConfig(config))).toMatchObject(keys);
    expect(parseConfig(serialiseConfig(config))).toEqual(config);
    for (const key of ["scoring_func", "router_choice", "group_best", "shared_expert_gate"]) {
      expect(JSON.parse(serialiseConfig(small()))).not.toHaveProperty(key);
    }
  });

  test("published keys, plain JSON, nothing of ours unless it is used", () => {
    const text = serialiseConfig(small());
    const keys = JSON.parse(text) as Keys;
    expect(keys).toMatchObject(
      { architectures: ["NemotronHForCausalLM"], model_type: "nemotron_h", eos_token_id: 2 },
    );
    for (const key of ["time_step_limit", "dt_min_clamp", "eos_token_ids", "moe_latent_size",
      "block_configs"]) {
      expect(keys).not.toHaveProperty(key);
    }
    const odd = small({ time_step_limit: [0.5, Infinity], dt_min_clamp: true, eos_token_id: [2, 3],
      pad_token_id: null,
      intermediate_size: [24], moe_latent_size: 4, num_nextn_predict_layers: 1 });
    expect(JSON.parse(serialiseConfig(odd))).toMatchObject(
      { time_step_limit: [0.5, 1e308], dt_min_clamp: true },
    );
    expect(parseConfig(serialiseConfig(small({ ...odd, mtp_hybrid_override_pattern: "*" })))).toMatchObject({
      time_step_limit: [0.5, Infinity], dt_min_clamp: true,
    });
  });

  test.each(readdirSync(golden))("the configuration of the %s checkpoint", (name) => {
    const config = parseConfig(readFileSync(new URL(`${name}/config.json`, golden)));
    expect(config.num_hidden_layers).toBe(layerSpecs(config).length);
    expect(parseConfig(serialiseConfig(config))).toEqual(config);
  });
});

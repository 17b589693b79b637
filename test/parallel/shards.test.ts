import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { listParameters } from "../../src/models/checkpoint_names.ts";
import type { Parameter } from "../../src/models/checkpoint_names.ts";
import { parseConfig } from "../../src/models/config.ts";
import { preset } from "../../src/models/presets.ts";
import { shardOf } from "../../src/parallel/shards.ts";
import type { ShardRank, ShardSizes, Values } from "../../src/parallel/shards.ts";
import { ConfigError, ShapeError } from "../../src/tensor/errors.ts";
import { sizeOf } from "../../src/tensor/ndarray.ts";

/** Every kind of layer with every bias, and the prediction block. */
const config = parseConfig({
  hybrid_override_pattern: "M*-E", vocab_size: 24, hidden_size: 8, num_attention_heads: 8,
  num_key_value_heads: 2, head_dim: 2, mamba_num_heads: 8, mamba_head_dim: 2, ssm_state_size: 3, n_groups: 4,
  intermediate_size: 16, n_routed_experts: 8, num_experts_per_tok: 2, moe_intermediate_size: 12,
  moe_shared_expert_intermediate_size: 8, moe_latent_size: 4, num_nextn_predict_layers: 1, use_bias: true,
  attention_bias: true, mlp_bias: true, mtp_hybrid_override_pattern: "*E",
});
const parameters = listParameters(config);
const SOLO: ShardSizes = { tp: 1, ep: 1, etp: 1 };
const named = (name: string) => parameters.find((parameter) => parameter.name === name)!;

/** Values that are all different, so that one that lands elsewhere is seen. */
function valuesOf({ shape }: Parameter): Float32Array {
  return Float32Array.from({ length: sizeOf(shape) }, (_, i) => i + 0.25);
}

function pieces<V extends Values>(parameter: Parameter, values: V, layout: ShardSizes): V[] {
  const shard = shardOf(parameter, config, layout);
  return Array.from({ length: shard.ranks }, (_, i) => shard.slice(values, shard.rankOf(i)));
}

const divisors = { tp: [1, 2, 4], ep: [1, 2, 4, 8], etp: [1, 2, 3, 4, 6, 12] };
const layouts = fc.record({
  tp: fc.constantFrom(...divisors.tp), ep: fc.constantFrom(...divisors.ep),
  etp: fc.constantFrom(...divisors.etp),
});

describe("cutting and joining", () => {
  test("give the same bits back under every layout", () => {
    for (const parameter of parameters) {
      const values = valuesOf(parameter);
      for (const tp of divisors.tp) {
        for (const ep of divisors.ep) {
          for (const etp of divisors.etp) {
            const shard = shardOf(parameter, config, { tp, ep, etp });
            const cut = pieces(parameter, values, { tp, ep, etp });
            expect(cut.every((piece) => piece.length === sizeOf(shard.shape))).toBe(true);
            const held = cut.reduce((sum, piece) => sum + piece.length, 0);
            expect(held, parameter.name).toBe(values.length * shard.copies);
            expect(shard.join(cut), parameter.name).toEqual(values);
          }
        }
      }
    }
  });

  test("go from any layout to any other, TP 2 to 4 to 1 among them", () => {
    const chain = (parameter: Parameter, ...through: readonly ShardSizes[]) => {
      let whole = valuesOf(parameter);
      for (const layout of through) {
        whole = shardOf(parameter, config, layout).join(pieces(parameter, whole, layout));
      }
      return whole;
    };
    const tp = (size: number): ShardSizes => ({ ...SOLO, tp: size });
    for (const parameter of parameters) {
      expect(chain(parameter, tp(2), tp(4), tp(1))).toEqual(valuesOf(parameter));
    }
    fc.assert(fc.property(fc.constantFrom(...parameters), layouts, layouts, (parameter, one, other) => {
      expect(chain(parameter, one, other)).toEqual(valuesOf(parameter));
    }), { numRuns: 100 });
  });

  test("keep the bits of 16-bit and 8-bit formats, NaN among them", () => {
    const parameter = named("backbone.layers.3.mixer.experts.down_proj");
    const layout = { tp: 1, ep: 2, etp: 3 };
    const shard = shardOf(parameter, config, layout);
    for (const type of [Uint16Array, Uint8Array]) {
      const values = type.from(Array.from(valuesOf(parameter), (_, i) => 0x7fc1 + 31 * i));
      const back = shard.join(pieces(parameter, values, layout));
      expect(back).toBeInstanceOf(type);
      expect(back).toEqual(values);
    }
    const nan = new Float32Array(sizeOf(parameter.shape));
    new Uint32Array(nan.buffer).fill(0x7fc00123);
    const back = shard.join(pieces(parameter, nan, layout));
    expect(new Uint32Array(back.buffer).every((bits) => bits === 0x7fc00123)).toBe(true);
  });

  test("make copies: the parameter does not change with its pieces", () => {
    for (const name of ["backbone.norm_f.weight", "lm_head.weight"]) {
      const values = valuesOf(named(name));
      for (const piece of pieces(named(name), values, { ...SOLO, tp: 2 })) piece.fill(0);
      expect(values).toEqual(valuesOf(named(name)));
    }
  });
});

describe("what a rank holds", () => {
  const rows = (name: string, tp: number, rank: number): number[] => {
    const parameter = named(name);
    const [count, width] = [parameter.shape[0]!, sizeOf(parameter.shape.slice(1))];
    const numbered = Float32Array.from({ length: count * width }, (_, i) => Math.floor(i / width));
    const piece = shardOf(parameter, config, { ...SOLO, tp }).slice(numbered, { tp: rank, ep: 0, etp: 0 });
    return [...piece].filter((_, i) => i % width === 0);
  };
  const range = (from: number, to: number) => Array.from({ length: to - from }, (_, i) => from + i);

  test("Mamba-2 projections and convolutions are cut part by part", () => {
    // z, x: 16 rows each; B, C: 12 (4 groups of 3); dt: 8 heads.
    expect(rows("backbone.layers.0.mixer.in_proj.weight", 2, 1)).toEqual([
      ...range(8, 16), ...range(24, 32), ...range(38, 44), ...range(50, 56), ...range(60, 64),
    ]);
    expect(rows("backbone.layers.0.mixer.in_proj.bias", 4, 0)).toEqual([
      ...range(0, 4), ...range(16, 20), ...range(32, 35), ...range(44, 47), ...range(56, 58),
    ]);
    for (const leaf of ["weight", "bias"]) {
      expect(rows(`backbone.layers.0.mixer.conv1d.${leaf}`, 2, 0)).toEqual(
        [...range(0, 8), ...range(16, 22), ...range(28, 34)]);
    }
    for (const leaf of ["A_log", "D", "dt_bias"]) {
      expect(rows(`backbone.layers.0.mixer.${leaf}`, 4, 3)).toEqual([6, 7]);
    }
    expect(rows("backbone.layers.0.mixer.norm.weight", 4, 1)).toEqual(range(4, 8));
  });

  test("a single key head is shared by all ranks, and is no copy like a norm", () => {
    const one = { ...config, num_key_value_heads: 1 };
    for (const name of ["k_proj", "v_proj"]) {
      const whole = named(`backbone.layers.1.mixer.${name}.weight`);
      const parameter = { ...whole, shape: [2, config.hidden_size] };
      const shard = shardOf(parameter, one, { ...SOLO, tp: 4 });
      expect(shard).toMatchObject({ copies: 4, replicas: [], shape: parameter.shape });
      expect(shard.cuts).toHaveLength(1);
      const values = valuesOf(parameter);
      const parts = [0, 1, 2, 3].map((tp) => shard.slice(values, { tp, ep: 0, etp: 0 }));
      for (const part of parts) expect(part).toEqual(values);
      expect(shard.join(parts)).toEqual(values);
    }
    expect(shardOf(named("backbone.norm_f.weight"), one, { ...SOLO, tp: 4 })).toMatchObject(
      { copies: 4, replicas: ["tp"], cuts: [] });
  });

  test("keys and values go to the ranks of their query heads, as copies where there are fewer", () => {
    expect(rows("backbone.layers.1.mixer.q_proj.weight", 4, 1)).toEqual(range(4, 8));
    for (const leaf of ["k_proj.weight", "v_proj.bias"]) {
      expect([0, 1, 2, 3].map((rank) => rows(`backbone.layers.1.mixer.${leaf}`, 4, rank))).toEqual(
        [[0, 1], [0, 1], [2, 3], [2, 3]]);
    }
    const { copies, replicas } = shardOf(
      named("backbone.layers.1.mixer.k_proj.weight"), config, { ...SOLO, tp: 4 });
    expect({ copies, replicas }).toEqual({ copies: 2, replicas: [] });
  });

  test("experts are whole and contiguous on ep, and cut by their width on etp", () => {
    const layout = { tp: 2, ep: 4, etp: 2 };
    const rank: ShardRank = { tp: 1, ep: 1, etp: 1 };
    const up = shardOf(named("backbone.layers.3.mixer.experts.up_proj"), config, layout);
    const down = shardOf(named("backbone.layers.3.mixer.experts.down_proj"), config, layout);
    expect([up.shape, down.shape]).toEqual([[2, 6, 4], [2, 4, 6]]);
    expect([up.expert, up.ranks, up.indexOf(rank)]).toEqual([true, 8, 3]);
    // Expert 2, its row 6; expert 2, row 0, column 6.
    expect(up.slice(valuesOf(up.parameter), rank)[0]).toBe(2 * 12 * 4 + 6 * 4 + 0.25);
    expect([...down.slice(valuesOf(down.parameter), rank).subarray(0, 7)]).toEqual(
      [...range(102, 108), 114].map((i) => i + 0.25));
  });

  test("replicated parameters are the named ones, and no others", () => {
    const whole = parameters.filter((each) => shardOf(each, config, { tp: 2, ep: 2, etp: 2 }).replicas.length)
      .map(({ name }) => name.replace(/\d+/, "0"));
    expect(new Set(whole)).toEqual(new Set([
      "backbone.layers.0.norm.weight", "backbone.norm_f.weight", "backbone.layers.0.mixer.gate.weight",
      "backbone.layers.0.mixer.gate.e_score_correction_bias",
      ...["out_proj.bias", "o_proj.bias", "down_proj.bias", "shared_experts.down_proj.bias",
        "fc1_latent_proj.weight", "fc1_latent_proj.bias", "fc2_latent_proj.weight", "fc2_latent_proj.bias",
      ].map((name) => `backbone.layers.0.mixer.${name}`),
      "mtp.layers.0.enorm.weight", "mtp.layers.0.hnorm.weight", "mtp.layers.0.eh_proj.weight",
      "mtp.layers.0.norm.weight", "mtp.layers.0.final_layernorm.weight", "mtp.layers.0.mixer.o_proj.bias",
      "mtp.layers.0.mixer.gate.weight", "mtp.layers.0.mixer.gate.e_score_correction_bias",
      ...["shared_experts.down_proj.bias", "fc1_latent_proj.weight", "fc1_latent_proj.bias",
        "fc2_latent_proj.weight", "fc2_latent_proj.bias"].map((name) => `mtp.layers.0.mixer.${name}`),
    ]));
  });

  test("a rank of the largest model holds its share", () => {
    const ultra = preset("nemotron-3-ultra-550b-a55b");
    const held = listParameters(ultra).filter(({ kind }) => kind === "expert")
      .reduce((sum, each) => sum + sizeOf(shardOf(each, ultra, { tp: 2, ep: 32, etp: 1 }).shape), 0);
    // 48 layers and the prediction block, of 512 experts, two matrices of 5120 x 2048 each.
    expect(held).toBe((49 * 512 * 2 * 5120 * 2048) / 32);
  });
});

describe("what cannot be", () => {
  test.each<[string, Partial<ShardSizes>, string]>([
    ["backbone.embeddings.weight", { tp: 5 }, "expected a divisor of 24 (the vocabulary;"],
    ["backbone.layers.0.mixer.in_proj.weight", { tp: 8 }, "expected a divisor of 4 (Mamba-2 groups;"],
    ["backbone.layers.1.mixer.q_proj.weight", { tp: 3 }, "expected a divisor of 8 (attention heads;"],
    ["backbone.layers.1.mixer.k_proj.weight", { tp: 3 }, "of 2 (key heads, or a multiple;"],
    ["backbone.layers.2.mixer.up_proj.weight", { tp: 3 }, "expected a divisor of 16 (the hidden width;"],
    ["backbone.layers.3.mixer.experts.up_proj", { ep: 3 }, "ep: expected a divisor of 8 (routed"],
    ["backbone.layers.3.mixer.experts.down_proj", { etp: 5 }, "a divisor of 12 (the experts' width;"],
  ])("%s under %o", (name, layout, message) => {
    const make = () => shardOf(named(name), config, { ...SOLO, ...layout });
    expect(make).toThrow(ConfigError);
    expect(make).toThrow(message);
    expect(make).toThrow(name);
  });

  test("values and pieces of the wrong number", () => {
    const shard = shardOf(named("lm_head.weight"), config, { ...SOLO, tp: 2 });
    expect(() => shard.slice(new Float32Array(5), shard.rankOf(0))).toThrow(
      new ShapeError("lm_head.weight: expected 192 values, found 5"));
    expect(() => shard.join([new Float32Array(96)])).toThrow("expected 2 pieces, found 1");
    expect(() => shard.join([new Float32Array(96), new Float32Array(95)])).toThrow(ShapeError);
  });
});

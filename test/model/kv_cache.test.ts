import { expect, test } from "vitest";
import { Generator } from "../../src/infer/engine.ts";
import { memorySource } from "../../src/io/files.ts";
import { encodeSafetensors, openSafetensors, type TensorEntry } from "../../src/io/safetensors.ts";
import { stateBytes } from "../../src/models/accounting.ts";
import { loadModel, parameterEntries, readKVScales } from "../../src/models/checkpoint.ts";
import { parseConfig } from "../../src/models/config.ts";
import { evaluateIncremental } from "../../src/models/evaluate.ts";
import { NemotronH } from "../../src/models/nemotron_h.ts";
import { createParameters } from "../../src/models/parameters.ts";
import { e4m3ToF32, f32ToE4m3 } from "../../src/tensor/dtype.ts";
import { onEveryAdapter } from "../support/devices.ts";

const SIZES = {
  vocab_size: 64, hidden_size: 32, num_attention_heads: 4, num_key_value_heads: 2, head_dim: 8,
  mamba_num_heads: 4, mamba_head_dim: 8, ssm_state_size: 8, n_groups: 2, chunk_size: 16,
    intermediate_size: 32,
  n_routed_experts: 4, num_experts_per_tok: 2, moe_intermediate_size: 16, initializer_range: 0.15,
  moe_shared_expert_intermediate_size: 16, eos_token_id: 2, hybrid_override_pattern: "M*-*",
  num_nextn_predict_layers: 1, mtp_hybrid_override_pattern: "*-",
};
const config = parseConfig(SIZES);
const scales = new Map([1, 3].map((i) => [`backbone.layers.${i}.mixer`, { key: 0.03, value: 0.04 }]));
const inputs = {
  batch: 2, seqlen: 21, input_ids: Int32Array.from({ length: 42 }, (_, i) => (11 * i) % 64),
};

function largestError(found: ArrayLike<number>, expected: ArrayLike<number>): number {
  let [error, scale] = [0, 0];
  for (let i = 0; i < expected.length; i++) {
    error = Math.max(error, Math.abs(found[i]! - expected[i]!));
    scale = Math.max(scale, Math.abs(expected[i]!));
  }
  return error / scale;
}

/** Mean KL divergence of predictions, in nats, of rows of logits. */
function divergence(of: ArrayLike<number>, by: ArrayLike<number>, width: number): number {
  const logProbabilities = (logits: ArrayLike<number>, row: number) => {
    const own = Array.from({ length: width }, (_, i) => logits[row * width + i]!);
    const most = Math.max(...own);
    const sum = own.reduce((total, x) => total + Math.exp(x - most), 0);
    return own.map((x) => x - most - Math.log(sum));
  };
  let total = 0;
  const rows = of.length / width;
  for (let row = 0; row < rows; row++) {
    const [p, q] = [logProbabilities(of, row), logProbabilities(by, row)];
    p.forEach((x, i) => (total += Math.exp(x) * (x - q[i]!)));
  }
  return total / rows;
}

const f32 = (name: string, ...values: number[]): TensorEntry =>
  ({ name, dtype: "F32", shape: values.length === 1 ? [] : [values.length],
    bytes: new Uint8Array(Float32Array.from(values).buffer) });

await onEveryAdapter((device) => {
  test("keys and values in FP8: exact codes, one result for all pieces, within the format's error", async (
    ) => {
    const before = device.pool.liveBytes;
    const model = new NemotronH(config, createParameters(device, config, 1), scales);
    expect(model.kvFormat).toBe("fp8");
    const plain = await evaluateIncremental(model, inputs, [17, 1, 1, 1, 1], "f32");
    const whole = await evaluateIncremental(model, inputs, [17, 1, 1, 1, 1]);
    const pieces = await evaluateIncremental(model, inputs, [5, 9, 1]);
    expect(largestError(pieces.logits, whole.logits)).toBeLessThan(2e-5);
    const error = largestError(whole.logits, plain.logits);
    expect(error).toBeGreaterThan(1e-4); // codes are in use
    expect(error).toBeLessThan(0.06); // half a step of three fraction bits
    expect(divergence(plain.logits, whole.logits, config.vocab_size)).toBeLessThan(1e-3);
    // No attention comes before the first one: both runs give it the same keys.
    for (const [name, scale] of [["key", 0.03], ["value", 0.04]] as const) {
      const exact = plain.caches.get(`cache.1.${name}`)!;
      const coded = whole.caches.get(`cache.1.${name}`)!;
      expect(coded.shape).toEqual(exact.shape);
      expect(coded.data).toEqual((exact.data as Float32Array).map((x) =>
        e4m3ToF32(f32ToE4m3(Math.fround(x / Math.fround(scale)))) * scale));
    }
    model.dispose();
    expect(device.pool.liveBytes).toBe(before);
  });

  test("generation takes a quarter of the bytes, and drafts leave its tokens as they are", async () => {
    const before = device.pool.liveBytes;
    const model = new NemotronH(config, createParameters(device, config, 1), scales);
    const run = async (draft: number, kv?: "f32") => {
      const generator = new Generator(model, 32, kv);
      const tokens: number[] = [];
      for await (const token of generator.generate([1, 2, 3, 4, 5], { maxTokens: 16, draft })) tokens.push(
        token);
      const bytes = generator.kvBytes;
      generator.dispose();
      return { tokens, bytes };
    };
    const [coded, drafted, plain] = [await run(0), await run(2), await run(0, "f32")];
    expect(drafted.tokens).toEqual(coded.tokens);
    expect(4 * coded.bytes).toBe(plain.bytes);
    const { kvPerToken } = stateBytes(config, { kv: "float8_e4m3fn" });
    expect(coded.bytes).toBe(32 * kvPerToken * 3 / 2); // and the prediction block's attention
    model.dispose();
    expect(device.pool.liveBytes).toBe(before);
  });

  test("a checkpoint's scales decide, and wrong ones are named", async () => {
    const before = device.pool.liveBytes;
    const model = new NemotronH(config, createParameters(device, config, 1));
    expect(model.kvFormat).toBe("f32");
    const entries = parameterEntries(model);
    const open = async (...more: TensorEntry[]) => {
      const bytes = await encodeSafetensors([...entries, ...more]);
      return { name: "memory", open: async (file: string) =>
        (file === "model.safetensors" ? memorySource(file, bytes) : null) };
    };
    const [k, v] = ["backbone.layers.1.mixer.k_proj.k_scale", "backbone.layers.1.mixer.v_proj.v_scale"];
    const loaded = await loadModel(device, config, await open(f32(k, 0.5), f32(v, 0.25)));
    expect([...loaded.kvScales]).toEqual([["backbone.layers.1.mixer", { key: 0.5, value: 0.25 }]]);
    loaded.dispose();
    await expect(loadModel(device, config, await open(f32(k, NaN)))).rejects.toThrow(
      `tensor "${k}": expected scales that are positive and finite, found NaN`);
    await expect(loadModel(device, config, await open(f32(v, 1, 2)))).rejects.toThrow(
      `tensor "${v}": expected 1 scale, found 2`);
    model.dispose();
    expect(device.pool.liveBytes).toBe(before);
  });

  test("heads whose codes fill no whole words are refused", () => {
    const odd = parseConfig({ ...SIZES, head_dim: 6 });
    const model = new NemotronH(odd, createParameters(device, odd, 1));
    expect(() => model.createCache(1, 8, "fp8")).toThrow(
      /FP8 cache needs heads of a multiple of 4 numbers, found 6 in backbone\.layers\.1\.mixer/);
    model.dispose();
  });
});

test("names of other prefixes are scales too, one alone leaves the other at 1", async () => {
  const bytes = await encodeSafetensors([f32("model.layers.7.mixer.v_proj.v_scale", 0.125)]);
  const reader = await openSafetensors(memorySource("m", bytes));
  expect([...await readKVScales(reader)]).toEqual([["backbone.layers.7.mixer", { key: 1, value: 0.125 }]]);
});

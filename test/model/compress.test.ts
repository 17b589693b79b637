import { describe, expect, test } from "vitest";
import { applyFold, channelScales, columnWeights, listFolds } from "../../src/compress/awq.ts";
import { calibrate, calibrationData, InputStats, meanLoss } from "../../src/compress/calibrate.ts";
import { Divergence } from "../../src/compress/divergence.ts";
import { quantiseModel, type QuantiseOptions } from "../../src/compress/quantise.ts";
import { memorySource } from "../../src/io/files.ts";
import { dequantised, readStoredWeight } from "../../src/io/quantized.ts";
import { encodeSafetensors, openSafetensors } from "../../src/io/safetensors.ts";
import { parameterEntries } from "../../src/models/checkpoint.ts";
import { listParameters, tensorsOf } from "../../src/models/checkpoint_names.ts";
import { type NemotronHConfig, parseConfig } from "../../src/models/config.ts";
import { evaluate } from "../../src/models/evaluate.ts";
import { NemotronH } from "../../src/models/nemotron_h.ts";
import { createParameters, uploadWeights } from "../../src/models/parameters.ts";
import type { Device } from "../../src/tensor/device.ts";
import { encodeFloat } from "../../src/tensor/dtype.ts";
import { sizeOf } from "../../src/tensor/ndarray.ts";
import { fillUniform } from "../../src/tensor/philox.ts";
import { byteTokenizer } from "../../src/text/byte_tokenizer.ts";
import { tokenizeDocuments } from "../../src/train/packing.ts";
import { onEveryAdapter } from "../support/devices.ts";

const SIZES = {
  vocab_size: 260, hidden_size: 32, num_attention_heads: 4, num_key_value_heads: 2, head_dim: 8,
  mamba_num_heads: 4, mamba_head_dim: 8, ssm_state_size: 8, n_groups: 2, chunk_size: 16,
    intermediate_size: 48,
  n_routed_experts: 4, num_experts_per_tok: 2, moe_intermediate_size: 16, initializer_range: 0.1,
  moe_shared_expert_intermediate_size: 32, eos_token_id: 256, attention_bias: true, mlp_bias: true,
};
/** With a latent width and a prediction block, and without. */
const CONFIGS = {
  latent: parseConfig({
    ...SIZES, hybrid_override_pattern: "M*-E", moe_latent_size: 16, num_nextn_predict_layers: 1,
    mtp_hybrid_override_pattern: "*E",
  }),
  plain: parseConfig({ ...SIZES, hybrid_override_pattern: "E*M-" }),
};
const text = "It was the best of times, it was the worst of times, it was the age of wisdom. ".repeat(8);
const corpus = tokenizeDocuments([{ name: "a", text }], byteTokenizer(260));

const create = (device: Device, config: NemotronHConfig) =>
  new NemotronH(config, createParameters(device, config, 3));

/** Values by checkpoint name, with biases that are not zero. */
async function valuesOf(model: NemotronH): Promise<Map<string, Float32Array>> {
  const values = new Map<string, Float32Array>();
  for (const [p, parameter] of listParameters(model.config).entries()) {
    let whole = await model.parameters.get(parameter.name)!.read() as Float32Array;
    if (parameter.kind === "bias") {
      whole = fillUniform({ seed: 1, stream: p, step: 0 }, new Float32Array(whole.length)).map(
        (x) => x - 0.5);
    }
    tensorsOf(parameter).forEach(({ name, shape }, i) =>
      values.set(name, whole.slice(i * sizeOf(shape), (i + 1) * sizeOf(shape))));
  }
  return values;
}

function modelOf(
  device: Device, config: NemotronHConfig, values: ReadonlyMap<string, Float32Array>,
): NemotronH {
  const stacked = new Map(listParameters(config).map((parameter) => {
    const parts = tensorsOf(parameter).map(({ name }) => values.get(name)!);
    const whole = new Float32Array(sizeOf(parameter.shape));
    parts.forEach((part, i) => whole.set(part, i * part.length));
    return [parameter.name, whole];
  }));
  return new NemotronH(config, uploadWeights(device, config, stacked, "f32"));
}

const inputs = {
  batch: 1, seqlen: 24, input_ids: Int32Array.from({ length: 24 }, (_, i) => (41 * i) % 256),
  labels: Int32Array.from({ length: 24 }, (_, i) => (41 * i) % 256),
};

function largestError(found: ArrayLike<number>, expected: ArrayLike<number>): number {
  let [error, scale] = [0, 0];
  for (let i = 0; i < expected.length; i++) {
    error = Math.max(error, Math.abs(found[i]! - expected[i]!));
    scale = Math.max(scale, Math.abs(expected[i]!));
  }
  return error / scale;
}

test("rows are shorter where there is less text, and what is evaluated on was not calibrated with", () => {
  const data = calibrationData(corpus, 32, 100);
  expect(data.shared).toBe(false);
  const rows = (batches: typeof data.calibration) => new Set(batches.flatMap(({ batch, seqlen, input_ids }) =>
    Array.from({ length: batch }, (_, b) => input_ids.subarray(b * seqlen, (b + 1) * seqlen).join())));
  const [seen, held] = [rows(data.calibration), rows(data.evaluation)];
  expect([...held].filter((row) => seen.has(row))).toEqual([]);
  expect(data.tokens).toBe(data.calibration.length * 4 * 32);
  const short = { ...corpus, tokens: corpus.tokens.slice(0, 33) };
  expect(calibrationData(short, 256, 8)).toMatchObject({ shared: true, seqlen: 32, tokens: 32 });
  expect(() => calibrationData({ ...corpus, tokens: corpus.tokens.slice(0, 32) }, 256, 8)).toThrow(
    "The calibration data holds 32 tokens, expected at least 33.");
});

test("channel scales are centred, and shared where the model shares channels", () => {
  const fold = listFolds(CONFIGS.plain).find(({ consumers }) => consumers[0]!.endsWith("o_proj.weight"))!;
  const x = Float64Array.from({ length: 32 }, (_, i) => 1 + i);
  const w = columnWeights([{ values: new Float32Array(64).fill(0.5), format: "nvfp4" }], 32);
  expect([...w]).toEqual(new Array(32).fill(1));
  const scales = channelScales(x, w, 0.5, fold);
  // Heads 0 and 1 read the values of one head.
  expect(scales[3]).toBe(scales[8 + 3]);
  expect(scales[3]).not.toBe(scales[16 + 3]);
  expect(Math.min(...scales) * Math.max(...scales)).toBeCloseTo(1, 10);
});

await onEveryAdapter((device) => {
  for (const [kind, config] of Object.entries(CONFIGS)) {
    test(`${kind}: moving scales from inputs into weights changes nothing`, async () => {
      const before = device.pool.liveBytes;
      const original = create(device, config);
      const values = await valuesOf(original);
      original.dispose();
      const plain = modelOf(device, config, values);
      const expected = await evaluate(plain, inputs);
      plain.dispose();
      const folds = listFolds(config);
      const changed = new Set<string>();
      for (const [i, fold] of folds.entries()) {
        const draws = fillUniform({ seed: 2, stream: i, step: 0 }, new Float32Array(fold.width));
        const scales = Float64Array.from(draws,
          (_, j) => 2 ** (2 * draws[fold.source ? fold.source(j) : j]! - 1));
        for (const name of applyFold(fold, scales, values, new Map())) changed.add(name);
      }
      // Every matrix of a product takes part, but for the head of a model whose prediction block reads it.
      const matrices = listParameters(config).filter(({ kind: of }) => /linear|expert|router$/.test(of));
      for (const { name } of matrices.flatMap(tensorsOf)) expect(changed, name).toContain(name);
      expect(changed.has("lm_head.weight")).toBe(kind === "plain");
      const folded = modelOf(device, config, values);
      const found = await evaluate(folded, inputs);
      folded.dispose();
      for (const [name, { data }] of expected) {
        expect(largestError(found.get(name)!.data, data), name).toBeLessThan(2e-5);
      }
      expect(device.pool.liveBytes).toBe(before);
    });
  }

  test("calibration sees what every product is fed with", async () => {
    const before = device.pool.liveBytes;
    const config = CONFIGS.latent;
    const model = create(device, config);
    const data = calibrationData(corpus, 24 + 8, 4);
    const { inputs: stats, kv } = await calibrate(model, data.calibration);
    const [batch] = data.calibration;
    expect(data.calibration).toHaveLength(1);
    const { batch: B, seqlen: L } = batch!;
    const internals = await evaluate(model, { batch: B, seqlen: L, input_ids: batch!.input_ids }, {
      internals: true,
    });
    const head = stats.get("lm_head.weight")!;
    const final = internals.get("hidden_states.final")!.data as Float32Array;
    expect(head.rows).toBe(B * L);
    expect(head.amax).toBe(final.reduce((most, x) => Math.max(most, Math.abs(x)), 0));
    expect([...head.kept[1]!]).toEqual([...final.subarray(32, 64)]);
    const experts = [0, 1, 2, 3].map(
      (e) => stats.get(`backbone.layers.3.mixer.experts.${e}.up_proj.weight`)!);
    const index = internals.get("router.3.topk_indices")!.data as Int32Array;
    const counts = [0, 1, 2, 3].map((e) => index.reduce((n, x) => n + Number(x === e), 0));
    expect(experts.map(({ rows }) => rows)).toEqual(counts.map((n) => n || 2 * B * L));
    expect(experts[0]!.width).toBe(16);
    expect(stats.has("mtp.layers.0.eh_proj.weight")).toBe(true);
    expect([...kv.keys()]).toEqual(["backbone.layers.1.mixer", "mtp.layers.0.mixer"]);
    expect(kv.get("backbone.layers.1.mixer")!.k).toBeGreaterThan(0);
    model.dispose();
    expect(device.pool.liveBytes).toBe(before);
  });

  test("the statistics follow scales, and rows that are merged stay apart", () => {
    const [a, b] = [new InputStats(2), new InputStats(2)];
    a.add(Float32Array.of(1, -4), true);
    b.merge(a);
    b.divide([2, 2]);
    expect([a.amax, b.amax, [...a.sample()], [...b.sample()]]).toEqual([4, 2, [1, -4], [0.5, -2]]);
  });

  describe("a quantised model", async () => {
    const config = CONFIGS.latent;
    const data = calibrationData(corpus, 32, 8);
    const options: QuantiseOptions =
      { format: "nvfp4", method: "max", exclude: ["lm_head", "mtp*"], kvCache: true };
    const run = async (more: Partial<QuantiseOptions>) => {
      const before = device.pool.liveBytes;
      const model = create(device, config);
      const source = await openSafetensors(
        memorySource("model", await encodeSafetensors(parameterEntries(model))));
      const quantised = await quantiseModel(model, source, data, { ...options, ...more });
      const bytes = await encodeSafetensors(quantised.entries);
      const loss = await meanLoss(model, data.evaluation);
      model.dispose();
      expect(device.pool.liveBytes).toBe(before);
      return { quantised, source, loss, reader: await openSafetensors(memorySource("out", bytes)) };
    };
    const mean = (list: readonly { output_error: number | null }[]) =>
      list.reduce((sum, { output_error }) => sum + output_error! ** 2, 0);

    test("loses less with better scales, and keeps what is excluded byte for byte", async () => {
      const max = await run({});
      const name = "backbone.layers.2.mixer.up_proj";
      const stored = await readStoredWeight(max.reader, `${name}.weight`);
      expect(stored.format).toBe("nvfp4");
      const report = max.quantised.reports.find(({ module }) => module === name)!;
      const original = await max.source.readTensorF32(`${name}.weight`);
      const lost = dequantised(stored as never).map((x, i) => x - original[i]!);
      const rms = (x: Float32Array) => Math.sqrt(x.reduce((sum, y) => sum + y * y, 0));
      expect(report.weight_error).toBeCloseTo(rms(lost) / rms(original), 6);
      expect(report.output_error).toBeGreaterThan(0.01);
      for (const kept of ["lm_head.weight", "backbone.layers.0.mixer.conv1d.weight",
        "mtp.layers.0.eh_proj.weight"]) {
        expect(await max.reader.read(kept)).toEqual(await max.source.read(kept));
      }
      expect([...max.reader.tensors.keys()]).toEqual(expect.arrayContaining([
        "backbone.layers.1.mixer.k_proj.k_scale", "backbone.layers.1.mixer.v_proj.v_scale",
        `${name}.input_scale`, `${name}.weight_scale_2`,
      ]));
      const mse = await run({ method: "mse" });
      const awq = await run({ method: "awq" });
      expect(mean(mse.quantised.reports)).toBeLessThan(mean(max.quantised.reports));
      expect(mean(awq.quantised.reports)).toBeLessThan(mean(max.quantised.reports));
      // What awq moved does not change the model itself.
      expect(Math.abs(awq.loss / max.loss - 1)).toBeLessThan(1e-5);
      expect(awq.reader.info("backbone.layers.2.norm.weight").dtype).toBe("F32");
    });

    test("of mixed formats keeps within its budget and in the order of what they cost", async () => {
      const { quantised, reader, loss } = await run({ format: "mixed", bits: 7 });
      expect(quantised.module_bits).toBeLessThan(7.1);
      const formats = new Set(quantised.reports.map(({ format }) => format));
      expect(formats.size).toBeGreaterThan(1);
      for (const { group, cost } of quantised.sensitivities) {
        expect(cost["fp8"], group).toBeLessThan(cost["nvfp4"]!);
      }
      expect(loss).toBeCloseTo(quantised.loss_before, 6);
      for (const { module, format } of quantised.reports) {
        const found = (await readStoredWeight(reader, `${module}.weight`)).format;
        expect(found).toBe({ nvfp4: "nvfp4", fp8: "fp8_e4m3", bf16: null, mxfp8: "mxfp8_e4m3" }[format]);
      }
    });

    test("of a bf16 checkpoint with stacked experts has published names and the source's bytes", async () => {
      const model = create(device, config);
      const entries = await Promise.all([...model.parameters].map(async ([name, tensor]) => ({
        name: name.replace("backbone.", "model."), dtype: "BF16" as const, shape: tensor.shape,
        bytes: encodeFloat("BF16", await tensor.read() as Float32Array),
      })));
      const source = await openSafetensors(memorySource("model", await encodeSafetensors(entries)));
      const quantised = await quantiseModel(model, source, data, {
        ...options, format: "fp8", exclude: [...options.exclude, "*.experts.1.*"],
      });
      model.dispose();
      const reader = await openSafetensors(memorySource("out", await encodeSafetensors(quantised.entries)));
      const [kept, coded] = [1, 2].map((e) => `backbone.layers.3.mixer.experts.${e}.up_proj.weight`);
      const size = 16 * 16;
      expect(reader.info(kept!).dtype).toBe("BF16");
      expect(await reader.read(kept!)).toEqual(
        await source.read("model.layers.3.mixer.experts.up_proj", { start: size, count: size }));
      expect(reader.info(coded!).dtype).toBe("F8_E4M3");
      expect(reader.tensors.has("model.norm_f.weight")).toBe(false);
    });

    test("learns its teacher's predictions, and nothing else changes", async () => {
      const taught = await run({ distill: { steps: 8, lr: 1e-3 } });
      const { before: first, after } = taught.quantised.distilled!;
      expect(after).toBeLessThan(0.7 * first);
      // What the written codes stand for predicts as well as training said.
      const before = device.pool.liveBytes;
      const decoded = new Map<string, Float32Array>();
      const original = new Map<string, Float32Array>();
      for (const parameter of listParameters(config)) {
        for (const { name } of tensorsOf(parameter)) {
          const stored = await readStoredWeight(taught.reader, name);
          decoded.set(name, stored.format === null ? stored.values : dequantised(stored));
          original.set(name, await taught.source.readTensorF32(name));
        }
      }
      const [teacher, student] = [modelOf(device, config, original), modelOf(device, config, decoded)];
      const divergence = await Divergence.of(teacher, data.calibration.slice(0, 4));
      expect(await divergence.measure(student)).toBeCloseTo(after, 6);
      for (const model of [teacher, student]) model.dispose();
      expect(device.pool.liveBytes).toBe(before);
      const isQuantised = (name: string) => taught.quantised.reports.some(
        ({ module }) => name.startsWith(module));
      for (const name of taught.source.tensors.keys()) {
        if (isQuantised(name)) continue;
        expect(await taught.reader.read(name), name).toEqual(await taught.source.read(name));
      }
    });

    test("is refused where blocks do not fit or a budget cannot be met", async () => {
      await expect(run({ format: "mxfp8" })).rejects.toThrow(
        /must have rows of whole mxfp8 blocks of 32 weights, found \[.*\]; leave it out with --exclude/);
      await expect(run({ format: "mixed", bits: 2 })).rejects.toThrow(/budget must be from .* found 2/);
      await expect(run({ method: "mse", distill: { steps: 1, lr: 1e-4 } })).rejects.toThrow(
        /Distillation rounds by the largest value, which the method mse does not/);
      const model = create(device, config);
      const name = "backbone.layers.2.mixer.up_proj.weight";
      for (const [of, value, message] of [
        ["lm_head.weight", 3e38, "The model's loss on the calibration text is NaN: expected a finite number"],
        [name, NaN, `tensor "${name}": expected finite weights, found NaN at 0`],
      ] as const) {
        const weights = model.parameters.get(of)!;
        weights.write(new Float32Array(weights.size).fill(value));
        const source = await openSafetensors(
          memorySource("model", await encodeSafetensors(parameterEntries(model))));
        await expect(quantiseModel(model, source, data, options)).rejects.toThrow(message);
      }
      model.dispose();
    });
  });
});

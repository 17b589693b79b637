import { describe, expect, test } from "vitest";
import { activationsPerToken, countLayers, countParameters, countTensors, forwardFlops,
  layerStrip, memoryToRun, memoryToTrain, stateBytes, weightBytes } from "../../src/models/accounting.ts";
import { listCheckpointTensors, listParameters } from "../../src/models/checkpoint_names.ts";
import { convSize, innerSize } from "../../src/models/config.ts";
import { preset, presetNames } from "../../src/models/presets.ts";
import { ConfigError } from "../../src/tensor/errors.ts";
import { sizeOf } from "../../src/tensor/ndarray.ts";

// Published or counted in released checkpoints: layers by kind, parameters without and with the prediction
// block, tensors in files, MiB of SSM state per layer and in all, bytes of keys and values per token as bf16.
const PUBLISHED: [string, string, number, number, number | null, number, number, number][] = [
  ["nemotron-h-4b", "24 M 4 * 24 -", 4_489_223_040, 4_489_223_040, null, 3.5, 84, 16384],
  ["nemotron-h-8b", "24 M 4 * 24 -", 8_100_852_736, 8_100_852_736, null, 4, 96, 16384],
  ["nemotron-h-47b", "45 M 5 * 48 -", 46_791_554_816, 46_791_554_816, null, 16, 720, 20480],
  ["nemotron-h-56b", "54 M 10 * 54 -", 56_324_350_464, 56_324_350_464, null, 16, 864, 40960],
  ["nemotron-nano-9b-v2", "27 M 4 * 25 -", 8_888_227_328, 8_888_227_328, null, 5, 135, 16384],
  ["nemotron-nano-12b-v2", "28 M 6 * 28 -", 12_310_001_152, 12_310_001_152, null, 5, 140, 24576],
  ["nemotron-3-nano-4b", "21 M 4 * 17 -", 3_973_556_832, 3_973_556_832, 263, 3.75, 78.75, 16384],
  ["nemotron-3-nano-30b-a3b", "23 M 6 * 23 E", 31_577_940_288, 31_577_940_288, 6243, 2, 46, 6144],
  ["nemotron-3.5-lightning-30b-a3b", "23 M 6 * 23 E", 31_577_940_288, 32_913_266_240, 6513, 2, 46, 6144],
  ["nemotron-3-super-120b-a12b", "40 M 8 * 40 E", 120_668_707_840, 123_611_033_088, 42683, 4, 160, 8192],
  ["nemotron-3-ultra-550b-a55b", "48 M 12 * 48 E", 549_308_993_536, 560_524_603_904, 51023, 8, 384, 12288],
];

const ATTENTION: Record<string, number[]> = {
  "nemotron-h-8b": [7, 18, 29, 40],
  "nemotron-h-47b": [17, 38, 49, 60, 86],
  "nemotron-h-56b": [7, 18, 29, 40, 51, 62, 73, 84, 95, 106],
  "nemotron-nano-9b-v2": [14, 21, 30, 39],
  "nemotron-nano-12b-v2": [7, 16, 25, 34, 43, 52],
  "nemotron-3-nano-4b": [12, 17, 24, 32],
  "nemotron-3-nano-30b-a3b": [5, 12, 19, 26, 33, 42],
  "nemotron-3-super-120b-a12b": [7, 16, 25, 36, 47, 58, 69, 78],
  "nemotron-3-ultra-550b-a55b": [7, 14, 23, 32, 39, 48, 57, 64, 73, 82, 89, 98],
};

describe("published models", () => {
  test.each(PUBLISHED)("%s: %s", (name, layers, backbone, total, tensors, ssmLayer, ssm, kv) => {
    const config = preset(name);
    const { mamba, attention, mlp, moe } = countLayers(config.hybrid_override_pattern);
    expect(`${mamba} M ${attention} * ${mlp > 0 ? `${mlp} -` : `${moe} E`}`).toBe(layers);
    expect(mamba + attention + mlp + moe).toBe(config.num_hidden_layers);
    const count = countParameters(config);
    expect([count.backbone, count.total, count.mtp]).toEqual([backbone, total, total - backbone]);
    expect([...count.byKind.values()].reduce((a, b) => a + b)).toBe(total);
    if (tensors !== null) expect(countTensors(config)).toBe(tensors);
    const state = stateBytes(config, { kv: "bfloat16" });
    expect([state.ssmPerLayer / 2 ** 20, state.ssm / 2 ** 20, state.kvPerToken]).toEqual([ssmLayer, ssm, kv]);
  });

  test.each(Object.entries(ATTENTION))("attention layers of %s", (name, indices) => {
    const pattern = preset(name).hybrid_override_pattern;
    expect([...pattern].flatMap((letter, i) => (letter === "*" ? [i] : []))).toEqual(indices);
  });

  test("Mamba-2 widths of the mixture-of-experts models", () => {
    const widths = (name: string) => {
      const config = preset(name);
      const [inner, conv] = [innerSize(config), convSize(config)];
      return [inner, conv, inner + conv + config.mamba_num_heads];
    };
    expect(widths("nemotron-3-nano-30b-a3b")).toEqual([4096, 6144, 10304]);
    expect(widths("nemotron-3-super-120b-a12b")).toEqual([8192, 10240, 18560]);
    expect(widths("nemotron-3-ultra-550b-a55b")).toEqual([16384, 18432, 35072]);
  });

  test("active parameters are those in the names", () => {
    const active = (name: string) => Math.round(countParameters(preset(name)).active / 1e9);
    // A3B counts without embeddings and head; A12B and A55B with them, to within their rounding.
    const nano = countParameters(preset("nemotron-3-nano-30b-a3b"));
    expect(Math.round(nano.activeWithoutEmbeddings / 1e9)).toBe(3);
    expect(nano.active - nano.activeWithoutEmbeddings).toBe(2 * 131072 * 2688);
    expect([active("nemotron-3-super-120b-a12b"), active("nemotron-3-ultra-550b-a55b")]).toEqual([13, 56]);
    const dense = countParameters(preset("nemotron-h-8b"));
    expect(dense.active).toBe(dense.total);
  });
});

describe("small models", () => {
  test("unit has the 15,640 parameters of the hand-checked example", () => {
    expect(countParameters(preset("unit")).total).toBe(15640);
  });

  test("the others take bytes and hold every kind of layer", () => {
    for (const name of ["toy-dense", "toy-moe", "tiny"]) {
      const config = preset(name);
      expect([config.vocab_size, config.eos_token_ids, config.bos_token_id]).toEqual([260, [256], null]);
      expect(countParameters(config).total).toBeLessThan(2e6);
    }
    const tiny = preset("tiny");
    expect(Math.min(...Object.values(countLayers(tiny.hybrid_override_pattern)))).toBeGreaterThan(0);
    expect([tiny.num_nextn_predict_layers, tiny.moe_latent_size !== null]).toEqual([1, true]);
  });

  test("an unknown name lists the known ones", () => {
    expect(() => preset("gpt-2")).toThrow(ConfigError);
    expect(() => preset("toString")).toThrow(/expected one of nemotron-h-4b, .*tiny, found "toString"/);
    expect(new Set(presetNames()).size).toBe(15);
  });
});

describe("lists of parameters", () => {
  const names = ["tiny", "toy-dense", "unit", "nemotron-3-nano-30b-a3b"];
  test.each(names)("%s: names are unique, sums agree", (name) => {
    const config = preset(name);
    const parameters = listParameters(config);
    expect(new Set(parameters.map((parameter) => parameter.name)).size).toBe(parameters.length);
    const tensors = listCheckpointTensors(config);
    expect(tensors.length).toBe(countTensors(config));
    expect(new Set(tensors.map((tensor) => tensor.name)).size).toBe(tensors.length);
    const sum = (list: readonly { shape: readonly number[] }[]) =>
      list.reduce((n, { shape }) => n + sizeOf(shape), 0);
    expect([sum(parameters), sum(tensors)]).toEqual(
      [countParameters(config).total, countParameters(config).total],
    );
  });

  test("only the selection bias of routers is not trained", () => {
    const fixed = listParameters(preset("tiny")).filter(({ trainable }) => !trainable);
    expect(fixed.map(({ name }) => name)).toEqual([
      "backbone.layers.4.mixer.gate.e_score_correction_bias",
        "mtp.layers.1.mixer.gate.e_score_correction_bias",
    ]);
  });
});

describe("memory", () => {
  const nano = preset("nemotron-3-nano-4b");
  const count = countParameters(nano).total;

  test("weights in each format", () => {
    expect(weightBytes(nano, "f32")).toBe(4 * count);
    expect([weightBytes(nano, "f16"), weightBytes(nano, "bf16")]).toEqual([2 * count, 2 * count]);
    const quantised = ["mamba_linear", "mlp_linear"] as const;
    const linear = quantised.reduce((sum, kind) => sum + countParameters(nano).byKind.get(kind)!, 0);
    expect(weightBytes(nano, "fp8")).toBe(2 * (count - linear) + linear);
    expect(weightBytes(nano, "nvfp4")).toBe(2 * (count - linear) + linear * (9 / 16));
  });

  test("running: state grows with the batch, keys and values with the length too", () => {
    const run = (batch: number, tokens: number) => memoryToRun(nano, "bf16", batch, tokens);
    const [one, two, long] = [run(1, 1000), run(2, 1000), run(1, 2000)];
    expect(two.state).toBe(2 * one.state);
    expect(long.state - one.state).toBe(1000 * 16384);
    expect(one.total).toBe(2 * count + one.state);
    const { ssm, conv } = stateBytes(nano);
    expect(conv).toBe(21 * (7680 + 2 * 8 * 128) * 4 * 4);
    expect(one.state).toBe(ssm + conv + 1000 * 16384);
    expect(stateBytes(nano, { ssm: "float16" }).ssm).toBe(ssm / 2);
  });

  test("training: float32 masters, gradients and two moments, none for what is not trained", () => {
    const tiny = preset("tiny");
    const memory = memoryToTrain(tiny, 100);
    const total = countParameters(tiny).total;
    expect(memory.weights).toBe(4 * total);
    expect(memory.gradients).toBe(4 * (total - 16));
    expect(memory.optimizer).toBe(8 * (total - 16));
    expect(memory.activations).toBe(400 * activationsPerToken(tiny));
    expect(memory.total).toBe(memory.weights + memory.gradients + memory.optimizer + memory.activations);
    expect(memoryToTrain(tiny, 200).activations).toBe(2 * memory.activations);
    // Between the residual stream alone and a hundred times that.
    const residual = (tiny.num_hidden_layers + 2) * tiny.hidden_size;
    expect(activationsPerToken(tiny)).toBeGreaterThan(2 * residual);
    expect(activationsPerToken(tiny)).toBeLessThan(100 * residual);
  });
});

test("operations per token, by hand for the tiny preset", () => {
  const tiny = preset("tiny");
  const head = 260 * 64;
  const mamba = (2 * 128 + 2 * 2 * 16 + 8) * 64 + (128 + 64) * 4 + 128 * 64;
  const attention = 64 * 64 * 2 + 32 * 64 * 2;
  const moe = 8 * 64 + 2 * 32 * 64 + 2 * 2 * 64 * 32 + 2 * 64 * 64;
  const scan = 5 * 128 * 16;
  const backbone = 2 * (head + 2 * mamba + attention + 2 * 192 * 64 + moe) + 2 * scan + 4 * 64 * 10;
  expect(tiny.vocab_size).toBe(260);
  expect(tiny.mtp_hybrid_override_pattern).toBe("*E");
  expect(forwardFlops(tiny, 10)).toBe(backbone);
  expect(forwardFlops(tiny, 10, 2)).toBe(
    backbone + 2 * (2 * (head + 64 * 128 + attention + moe) + 4 * 64 * 10));
});

test("layers as text", () => {
  expect(layerStrip(preset("tiny"))).toBe([
    "0  M*-ME",
    "+  *E  predicts one more token",
    "",
    "2 x M Mamba-2: 8 heads of 16, state 16, 2 groups",
    "1 x * attention: 4 query and 2 key heads of 16",
    "1 x - MLP: 192 wide",
    "1 x E experts: 2 of 8, 64 wide in 32 latent, shared 64 wide",
  ].join("\n"));
  expect(layerStrip(preset("nemotron-3-nano-4b"), 20).split("\n").slice(0, 3)).toEqual([
    " 0  M-M-M-MM-M-M*-M-M*-M", "20  -M-M*-M-M-MM*-MMM-M-", "40  M-",
  ]);
});

import { describe, expect, test } from "vitest";
import { BITS, encodeMatrix, TARGET_FORMATS } from "../../src/compress/encode.ts";
import { codedEntries, quantisationConfigs, tensorFiles, withKey } from "../../src/compress/export.ts";
import { defaultExclusions, groupModules, matches, selectModules } from "../../src/compress/modules.ts";
import { memorySource } from "../../src/io/files.ts";
import { codedBytes, dequantised, readStoredWeight } from "../../src/io/quantized.ts";
import { encodeSafetensors, openSafetensors, openTensors } from "../../src/io/safetensors.ts";
import { preset } from "../../src/models/presets.ts";
import { decodeFloat32, e4m3ToF32 } from "../../src/tensor/dtype.ts";
import { fillNormal } from "../../src/tensor/philox.ts";

/** Normal weights with a few blocks of zeros and a few large values. */
function weights(rows: number, cols: number, seed: number): Float32Array {
  const values = fillNormal({ seed, stream: 0, step: 0 }, new Float32Array(rows * cols)).map((x) => 0.05 * x);
  values.fill(0, 32, 64);
  values[7] = 0.9;
  return values;
}

const squared = (a: Float32Array, b: Float32Array) => a.reduce((sum, x, i) => sum + (x - b[i]!) ** 2, 0);

describe("codes and scales", () => {
  test("NVFP4: the published vector", () => {
    const values = Float32Array.from([
      -0.02612192, 0.04134933, 0.01124917, 0.04269814, -0.04506588, 0.03557836, -0.01390148, -0.04468936,
      -0.04312159, 0.0483937, 0.0472805, 0.003125079, -0.004814237, 0.00478394, 0.0105036, 0.02774173,
      0.008394371, -0.002457679, -0.00077676, 0.0105643, -0.004126083, -0.0005547825, -0.01224176,
      0.007474116,
      0.01002604, -0.004256612, -0.009634528, 0.01445291, -0.01133801, -0.001356662, -0.001310295,
      -0.01175976,
    ]);
    const { codes, scales, global } = encodeMatrix(values, [1, 32], "nvfp4");
    expect(Buffer.from(codes).toString("hex")).toBe("7d736ffb7f171953" + "a6698c5fc67e9ef9");
    expect([...scales]).toEqual([0x7e, 0x70]);
    expect(global).toBeCloseTo(1.800360951e-5, 13);
  });

  test("NVFP4: blocks of zeros have scale 1, small blocks the smallest scale", () => {
    const values = new Float32Array(48);
    values[0] = 2688;
    values.fill(1e-3, 32);
    const { scales, global } = encodeMatrix(values, [1, 48], "nvfp4");
    expect(global).toBe(1);
    expect([...scales].map((byte) => e4m3ToF32(byte))).toEqual([448, 1, 2 ** -9]);
  });

  test("FP8: the largest value is 448, of a matrix of zeros nothing is lost", () => {
    const values = weights(4, 64, 1);
    const { codes, scales } = encodeMatrix(values, [4, 64], "fp8");
    expect(decodeFloat32("F32", scales)).toEqual(Float32Array.of(Math.fround(0.9) / 448));
    expect(codes[7]).toBe(0x7e);
    for (const format of TARGET_FORMATS) {
      expect(dequantised(encodeMatrix(new Float32Array(64), [2, 32], format))).toEqual(new Float32Array(64));
    }
  });

  test("MXFP8: no value saturates", () => {
    const values = Float32Array.from({ length: 64 }, (_, i) => (i < 32 ? 449 : 448));
    expect([...encodeMatrix(values, [1, 64], "mxfp8").scales]).toEqual([128, 127]);
  });

  for (const format of TARGET_FORMATS) {
    test(`${format}: the least squared error is no more than that of the largest value`, () => {
      const values = weights(32, 64, 2);
      const [max, mse] = [false, true].map((least) =>
        squared(values, dequantised(encodeMatrix(values, [32, 64], format, least)))) as [number, number];
      expect(mse).toBeLessThanOrEqual(max);
      if (format === "nvfp4") expect(mse).toBeLessThan(0.85 * max);
    });
  }

  test("NVFP4 with the least error tries every scale", () => {
    const values = weights(2, 32, 3);
    const { scales, global } = encodeMatrix(values, [2, 32], "nvfp4", true);
    const error = (block: Float32Array, byte: number) => {
      const scale = e4m3ToF32(byte) * global;
      return block.reduce((sum, x) => sum + Math.min(
        ...[0, 0.5, 1, 1.5, 2, 3, 4, 6].map((m) => (Math.abs(x) - m * scale) ** 2)), 0);
    };
    for (const b of [0, 1]) {
      const block = values.subarray(16 * b, 16 * b + 16);
      const all = Array.from({ length: 0x7e }, (_, i) => error(block, i + 1));
      expect(error(block, scales[b]!)).toBeCloseTo(Math.min(...all), 12);
    }
  });

  test("bits per weight are those of the bytes", () => {
    for (const format of TARGET_FORMATS) {
      const weight = encodeMatrix(weights(64, 256, 4), [64, 256], format);
      const ofTensor = format === "mxfp8" ? 0 : 4;
      expect(8 * (codedBytes(weight) - ofTensor)).toBe(BITS[format] * 64 * 256);
    }
  });
});

describe("files", () => {
  test("what is written is read back bit for bit", async () => {
    const values = weights(8, 64, 5);
    for (const format of TARGET_FORMATS) {
      const weight = encodeMatrix(values, [8, 64], format);
      const bytes = await encodeSafetensors(codedEntries("m", weight, 26.88));
      const reader = await openSafetensors(memorySource("m", bytes));
      expect(await readStoredWeight(reader, "m.weight")).toEqual(weight);
      if (format === "mxfp8") {
        expect([...reader.tensors.keys()].toSorted()).toEqual(["m.weight", "m.weight_scale"]);
        continue;
      }
      const input = (await reader.readTensorF32("m.input_scale"))[0]!;
      expect(input).toBeCloseTo(format === "fp8" ? 0.06 : 0.01, 8);
    }
  });

  test("many bytes become shards", async () => {
    const entries = ["a", "b", "c"].map((name) =>
      ({ name, dtype: "F32" as const, shape: [4], bytes: new Uint8Array(16).fill(name.charCodeAt(0)) }));
    const files = tensorFiles(entries, 32);
    const names = Object.keys(files);
    expect(names).toEqual([
      "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
    ]);
    const stored = new Map<string, Uint8Array>();
    for (const [name, content] of Object.entries(files)) {
      const pieces: Uint8Array[] = [];
      if (typeof content === "string") pieces.push(new TextEncoder().encode(content));
      else for await (const piece of content) pieces.push(piece);
      stored.set(name, Buffer.concat(pieces));
    }
    const reader = await openTensors({
      name: "memory",
      open: async (name) => (stored.has(name) ? memorySource(name, stored.get(name)!) : null),
    });
    expect([...reader.tensors.keys()].toSorted()).toEqual(["a", "b", "c"]);
    expect([...await reader.read("c")]).toEqual(new Array(16).fill(99));
  });

  test("metadata names what is quantised and what is not", () => {
    const modules = new Map([["a.up", "nvfp4"], ["a.down", "fp8"]] as const);
    const made = quantisationConfigs(
      { modules, mixed: true, excluded: ["lm_head"], kvCache: true, version: "1" });
    expect(made.hf_quant_config).toMatchObject({
      producer: { name: "modelopt" },
      quantization: {
        quant_algo: "MIXED_PRECISION", kv_cache_quant_algo: "FP8", exclude_modules: ["lm_head"],
        quantized_layers: { "a.up": { quant_algo: "NVFP4", group_size: 16 },
          "a.down": { quant_algo: "FP8" } },
      },
    });
    expect(made.quantization_config).toMatchObject({
      quant_method: "modelopt", ignore: ["lm_head"],
      config_groups: { group_0: { weights: { num_bits: 4, group_size: 16 }, targets: ["a.up"] } },
    });
    const one = quantisationConfigs({
      modules: new Map([["a.up", "fp8"]] as const), mixed: false, excluded: [], kvCache: false, version: "1",
    });
    expect(one.hf_quant_config).toMatchObject({
      quantization: { quant_algo: "FP8", kv_cache_quant_algo: null },
    });
  });

  test("a key is added to a config that JSON cannot hold", () => {
    const text = '{\n  "time_step_limit": [0.0, Infinity],\n  "x": {"y": 1}\n}\n';
    const added = withKey(text, "quantization_config", { quant_method: "modelopt" });
    expect(added).toBe(
      '{\n  "time_step_limit": [0.0, Infinity],\n  "x": {"y": 1},\n  "quantization_config": {\n' +
      '    "quant_method": "modelopt"\n  }\n}\n');
    expect(JSON.parse(withKey("{}", "a", {}))).toEqual({ a: {} });
  });
});

describe("modules", () => {
  const config = preset("tiny"); // M*-ME

  test("patterns match whole names", () => {
    expect(matches("mtp*", "mtp.layers.0.eh_proj")).toBe(true);
    expect(matches("mtp*", "backbone.mtp")).toBe(false);
    expect(matches("lm_head", "lm_head.x")).toBe(false);
    expect(matches("a.b", "axb")).toBe(false);
    expect(matches("layers.?.x", "layers.3.x")).toBe(true);
  });

  test("by default releases' exceptions stay", () => {
    const { chosen, excluded, unmatched } = selectModules(config, defaultExclusions(config));
    const names = chosen.map(({ name }) => name);
    expect(names.filter((name) => !name.includes("expert"))).toEqual([
      "backbone.layers.2.mixer.up_proj", "backbone.layers.2.mixer.down_proj",
      "backbone.layers.3.mixer.in_proj", "backbone.layers.3.mixer.out_proj",
    ]);
    expect(names).toContain("backbone.layers.4.mixer.experts.7.down_proj");
    for (const name of [
      "lm_head", "backbone.embeddings", "backbone.layers.0.mixer.in_proj", "backbone.layers.1.mixer.o_proj",
      "backbone.layers.4.mixer.gate", "backbone.layers.0.mixer.conv1d", "mtp.layers.0.eh_proj",
    ]) expect(excluded).toContain(name);
    expect(unmatched).toEqual([]);
  });

  test("all may be taken but routers and convolutions, and a pattern that matches nothing is named", () => {
    const { chosen, excluded, unmatched } = selectModules(config, ["*.nothing"]);
    expect(chosen.map(({ name }) => name)).toContain("lm_head");
    expect(excluded.every((name) => /gate|conv1d/.test(name))).toBe(true);
    expect(unmatched).toEqual(["*.nothing"]);
    expect(() => selectModules(config, ["*"])).toThrow(/Every matrix of the model is excluded by \*/);
  });

  test("queries, keys and values share a format, and so do the experts of a layer", () => {
    const groups = groupModules(selectModules(config, ["mtp*"]).chosen);
    const sizes = new Map(groups.map(({ name, modules }) => [name, modules.length]));
    expect(sizes.get("backbone.layers.1.mixer.qkv_proj")).toBe(3);
    expect(sizes.get("backbone.layers.1.mixer.o_proj")).toBe(1);
    expect(sizes.get("backbone.layers.4.mixer.experts")).toBe(16);
    expect(sizes.get("backbone.layers.4.mixer.shared_experts.up_proj")).toBe(1);
  });
});

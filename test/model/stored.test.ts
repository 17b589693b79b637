import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { expect, test } from "vitest";
import { encodeMatrix } from "../../src/compress/encode.ts";
import { tensorFiles } from "../../src/compress/export.ts";
import { openFolder } from "../../src/io/files.node.ts";
import { type Folder, memorySource } from "../../src/io/files.ts";
import { readWeightF32 } from "../../src/io/quantized.ts";
import { openTensors, type TensorEntry } from "../../src/io/safetensors.ts";
import { inspectCheckpoint, loadModel, readParameters } from "../../src/models/checkpoint.ts";
import { listCheckpointTensors } from "../../src/models/checkpoint_names.ts";
import { type NemotronHConfig, parseConfig } from "../../src/models/config.ts";
import { evaluate, evaluateIncremental } from "../../src/models/evaluate.ts";
import { NemotronH } from "../../src/models/nemotron_h.ts";
import { uploadWeights } from "../../src/models/parameters.ts";
import { dequantize } from "../../src/ops/quantize.ts";
import { encodeFloat } from "../../src/tensor/dtype.ts";
import { quantizeScaled } from "../../src/tensor/formats.ts";
import { decodeByHand, type Stored } from "../support/decode.ts";
import { onEveryAdapter } from "../support/devices.ts";

type Kind = "fp8" | "fp8_rows" | "nvfp4" | "mxfp8" | null;
type Layout = "modelopt" | "compressed-tensors";

const bytesOf = (...values: number[]) => new Uint8Array(Float32Array.from(values).buffer);

/** The tensors of one matrix in a layout; null as they are. */
function entriesOf(
  name: string, shape: readonly number[], values: Float32Array, kind: Kind, layout: Layout,
): TensorEntry[] {
  const module = name.replace(/\.weight$/, "");
  const [rows, cols] = shape as [number, number];
  if (kind === null) return [{ name, dtype: "F32", shape, bytes: encodeFloat("F32", values) }];
  if (kind === "fp8_rows") {
    const { codes, scales } = quantizeScaled(values, shape, "fp8_e4m3", { perRow: true });
    // compressed-tensors stores them in the model's own format.
    const halves = encodeFloat("BF16", scales as Float32Array);
    return [
      { name, dtype: "F8_E4M3", shape, bytes: codes },
      { name: `${module}.weight_scale`, dtype: "BF16", shape: [rows, 1], bytes: halves },
    ];
  }
  const { codes, scales, global } = encodeMatrix(values, shape, kind);
  const input: TensorEntry = { name: `${module}.input_scale`, dtype: "F32", shape: [], bytes: bytesOf(0.01) };
  if (kind === "fp8") {
    return [
      { name, dtype: "F8_E4M3", shape, bytes: codes },
      { name: `${module}.weight_scale`, dtype: "F32", shape: [1], bytes: scales }, input,
    ];
  }
  if (kind === "mxfp8") {
    return [
      { name, dtype: "F8_E4M3", shape, bytes: codes },
      { name: `${module}.weight_scale`, dtype: "U8", shape: [rows, cols / 32], bytes: scales },
    ];
  }
  const ours = layout === "modelopt";
  return [
    { name: ours ? name : `${module}.weight_packed`, dtype: "U8", shape: [rows, cols / 2], bytes: codes },
    { name: `${module}.weight_scale`, dtype: "F8_E4M3", shape: [rows, cols / 16], bytes: scales },
    ours ? { name: `${module}.weight_scale_2`, dtype: "F32", shape: [], bytes: bytesOf(global) }
      : { name: `${module}.weight_global_scale`, dtype: "F32", shape: [1], bytes: bytesOf(1 / global) },
    ours ? input : { ...input, name: `${module}.input_global_scale` },
  ];
}

/** A golden model with some matrices in other formats, in memory; many shards where `limit` is small. */
async function quantisedFolder(
  golden: string, kindOf: (name: string) => Kind, layout: Layout, more: readonly TensorEntry[] = [],
  limit = 2 ** 30,
): Promise<{ config: NemotronHConfig; folder: Folder; files: Map<string, Uint8Array> }> {
  const path = fileURLToPath(new URL(`../fixtures/golden/${golden}`, import.meta.url));
  const config = parseConfig(readFileSync(`${path}/config.json`));
  const reader = await openTensors(openFolder(path));
  const entries: TensorEntry[] = [...more];
  for (const { name, shape } of listCheckpointTensors(config)) {
    entries.push(...entriesOf(name, shape, await reader.readTensorF32(name), kindOf(name), layout));
  }
  await reader.close();
  const files = new Map<string, Uint8Array>();
  for (const [name, content] of Object.entries(tensorFiles(entries, limit))) {
    const pieces: Uint8Array[] = [];
    if (typeof content === "string") pieces.push(new TextEncoder().encode(content));
    else for await (const piece of content) pieces.push(piece);
    files.set(name, new Uint8Array(await new Blob(pieces as BlobPart[]).arrayBuffer()));
  }
  const folder = {
    name: "memory",
    open: async (file: string) => (files.has(file) ? memorySource(file, files.get(file)!) : null),
  };
  return { config, folder, files };
}

/** Experts in NVFP4, the state space in FP8, attention as it is; a mixture as the releases have it. */
const nano = (name: string): Kind => {
  if (/experts\.\d+\.(?:up|down)_proj|shared_experts\.up_proj|lm_head/.test(name)) return "nvfp4";
  if (/in_proj|embeddings|shared_experts\.down_proj/.test(name)) return "fp8";
  return name.includes("out_proj") ? "fp8_rows" : null;
};
/** The prediction block too. */
const latent = (name: string): Kind => {
  if (/mtp.*[qkv]_proj|eh_proj|mixer\.experts\.\d+\.up_proj/.test(name)) return "fp8_rows";
  if (/in_proj|shared_experts\.(?:up|down)_proj|lm_head|layers\.3\.mixer\.[qkv]_proj/.test(
    name)) return "nvfp4";
  return null;
};

function largestError(found: ArrayLike<number>, expected: ArrayLike<number>): number {
  let [error, scale] = [0, 0];
  for (let i = 0; i < expected.length; i++) {
    error = Math.max(error, Math.abs(found[i]! - expected[i]!));
    scale = Math.max(scale, Math.abs(expected[i]!));
  }
  return error / scale;
}

await onEveryAdapter((device) => {
  const cases = [
    { golden: "nano3_moe_flat", kindOf: nano, layout: "modelopt", limit: 20_000 },
    { golden: "super_latent_mtp", kindOf: latent, layout: "compressed-tensors", limit: 2 ** 30 },
  ] as const;
  for (const { golden, kindOf, layout, limit } of cases) {
    test(`${golden} in the layout of ${layout} keeps its codes and computes what they stand for`, async (
      ) => {
      const before = device.pool.liveBytes;
      const { config, folder, files } = await quantisedFolder(golden, kindOf, layout, [], limit);
      expect(files.size > 3).toBe(limit < 2 ** 30);
      const model = await loadModel(device, config, folder);
      const reader = await openTensors(folder);
      const values = new Map<string, Float32Array>();
      await readParameters(config, reader, async (name, read) => void values.set(name, await read()));
      const stored = new Map<string, Stored>();
      for (const [name, { dtype, shape }] of reader.tensors) {
        stored.set(name, { dtype, shape, bytes: (await reader.read(name)).slice() });
      }
      const coded = new Set<string>();
      for (const { name, parameter, expert } of listCheckpointTensors(config)) {
        if (kindOf(name) !== null) {
          const byHand = decodeByHand(stored, name.replace(/\.weight$/, ""));
          const first = (expert ?? 0) * byHand.length;
          expect(values.get(parameter.name)!.slice(first, first + byHand.length), name).toEqual(byHand);
        }
        const fits = parameter.shape.at(-1)! % 16 === 0;
        if (kindOf(name) !== null && fits) coded.add(parameter.name);
      }
      expect([...model.quantised.keys()].toSorted()).toEqual([...coded].toSorted());
      expect(coded.size).toBeGreaterThan(8);
      for (const [name, blocks] of model.quantised) {
        const decoded = dequantize(blocks);
        expect(await decoded.read(), name).toEqual(values.get(name));
        decoded.dispose();
      }
      const dense = new NemotronH(config, uploadWeights(device, config, values, "f32"));
      const ids = Int32Array.from({ length: 22 }, (_, i) => (7 * i) % config.vocab_size);
      const inputs = { batch: 2, seqlen: 11, input_ids: ids, labels: ids };
      const [found, expected] = [await evaluate(model, inputs), await evaluate(dense, inputs)];
      for (const [name, { data }] of expected) {
        expect(largestError(found.get(name)!.data, data), name).toBeLessThan(2e-5);
      }
      const pieces = await evaluateIncremental(model, inputs, [6, 2, 1, 1, 1]);
      expect(largestError(pieces.logits, expected.get("logits")!.data)).toBeLessThan(2e-5);
      // What is to be trained is decoded.
      const trainable = await loadModel(device, config, folder, true);
      expect(trainable.quantised.size).toBe(0);
      const [name] = coded;
      expect(await trainable.parameters.get(name!)!.read()).toEqual(values.get(name!));
      await reader.close();
      for (const each of [model, dense, trainable]) each.dispose();
      expect(device.pool.liveBytes).toBe(before);
    });
  }

  test("a folder says what it holds, and packed weights take their own bytes", async () => {
    const before = device.pool.liveBytes;
    const all = (name: string): Kind => (/_proj/.test(name) ? "nvfp4" : null);
    const { config, folder } = await quantisedFolder("nemotron_h_dense", all, "modelopt");
    const { parts, kept, kv } = await inspectCheckpoint(config, folder);
    expect(kv).toBe("f32");
    const nvfp4 = parts.find(({ format }) => format === "nvfp4")!;
    expect(new Set(kept.values())).toEqual(new Set(["nvfp4"]));
    expect(nvfp4.tensors).toBe(kept.size);
    expect(nvfp4.bytes).toBe((nvfp4.weights * 9) / 16 + 4 * nvfp4.tensors);
    const model = await loadModel(device, config, folder);
    const packed = [...model.quantised.values()].reduce((sum, { byteLength }) => sum + byteLength, 0);
    expect(packed).toBe(nvfp4.bytes);
    model.dispose();
    expect(device.pool.liveBytes).toBe(before);
  });

  test("experts with scales for all or for each row stay FP8 together; in two formats they become f32",
    async () => {
    const of = async (kindOf: (name: string) => Kind) => {
      const { config, folder } = await quantisedFolder("nano3_moe_flat", kindOf, "modelopt");
      const model = await loadModel(device, config, folder);
      const reader = await openTensors(folder);
      for (const { name, parameter, expert } of listCheckpointTensors(config)) {
        if (expert !== 1 || !name.includes(".1.mixer.experts.1.up")) continue;
        const blocks = model.quantised.get(parameter.name);
        const decoded = blocks ? dequantize(blocks) : model.parameters.get(parameter.name)!;
        const size = decoded.size / parameter.shape[0]!;
        expect((await decoded.read()).slice(size, 2 * size)).toEqual(await readWeightF32(reader, name));
        if (blocks) decoded.dispose();
      }
      const formats = [...model.quantised].filter(([name]) => name.includes("experts.up_proj"));
      await reader.close();
      model.dispose();
      return formats.map(([, blocks]) => blocks.format);
    };
    const before = device.pool.liveBytes;
    const isUp = /mixer\.experts\.(\d+)\.up_proj/;
    expect(await of((name) => (!isUp.test(name) ? null : isUp.exec(name)![1] === "1" ? "fp8_rows" : "fp8")))
      .toEqual(["fp8_e4m3", "fp8_e4m3", "fp8_e4m3"]);
    expect(await of((name) => (!isUp.test(name) ? null : isUp.exec(name)![1] === "1" ? "nvfp4" : "fp8")))
      .toEqual([]);
    expect(device.pool.liveBytes).toBe(before);
  });

  test("damaged codes and scales are one sentence, and nothing stays behind", async () => {
    const before = device.pool.liveBytes;
    const { config, files } = await quantisedFolder(
      "mlp_only", (name) => (name.includes("up_proj") ? "nvfp4" : null), "modelopt");
    const whole = files.get("model.safetensors")!;
    const text = new TextDecoder("latin1").decode(whole);
    const length = new DataView(whole.buffer).getUint32(0, true);
    const header = JSON.parse(text.slice(8, 8 + length)) as Record<string,
      { data_offsets: [number, number] }>;
    const up = "backbone.layers.0.mixer.up_proj";
    const load = async (change: (bytes: Uint8Array, at: (name: string) => number) => void) => {
      const bytes = whole.slice();
      change(bytes, (name) => 8 + length + header[`${up}.${name}`]!.data_offsets[0]);
      await loadModel(device, config, { name: "memory", open: async (file) =>
        (file === "model.safetensors" ? memorySource(file, bytes) : null) });
    };
    await expect(load((bytes, at) => (bytes[at("weight_scale") + 3] = 0x7f))).rejects.toThrow(
      `tensor "${up}.weight_scale": expected scales that are finite and not negative, found NaN at 3`);
    await expect(load((bytes, at) => bytes.fill(0, at("weight_scale_2"), at("weight_scale_2") + 4)))
      .rejects.toThrow(
        `tensor "${up}.weight_scale_2": expected scales that are positive and finite, found 0`);
    expect(device.pool.liveBytes).toBe(before);
  });
});

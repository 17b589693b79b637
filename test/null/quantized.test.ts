import { readFileSync } from "node:fs";
import { beforeAll, describe, expect, test } from "vitest";
import { memorySource } from "../../src/io/files.ts";
import { readWeightF32 } from "../../src/io/quantized.ts";
import { encodeSafetensors, openSafetensors } from "../../src/io/safetensors.ts";
import type { TensorEntry, TensorReader } from "../../src/io/safetensors.ts";
import { encodeFloat } from "../../src/tensor/dtype.ts";
import type { DType } from "../../src/tensor/dtype.ts";
import { FormatError } from "../../src/tensor/errors.ts";

const f32 = (...values: number[]) => encodeFloat("F32", Float32Array.from(values));

async function readerOf(tensors: Record<string, [DType, number[], Uint8Array]>): Promise<TensorReader> {
  const entries = Object.entries(tensors).map(([name, [dtype, shape, bytes]]): TensorEntry =>
    ({ name, dtype, shape, bytes }));
  return await openSafetensors(memorySource("m", await encodeSafetensors(entries)));
}

describe("NVFP4", () => {
  // A 64 x 128 matrix with zero blocks and ties: codes, scales and values of an independent implementation.
  let golden: TensorReader;
  let [packed, scales] = [new Uint8Array(0), new Uint8Array(0)];
  let global = 0;
  let values = new Float32Array(0);

  beforeAll(async () => {
    const fixture = readFileSync(new URL("../fixtures/nvfp4.safetensors", import.meta.url));
    golden = await openSafetensors(memorySource("nvfp4.safetensors", fixture));
    packed = new Uint8Array(await golden.read("nvfp4.packed"));
    scales = new Uint8Array(await golden.read("nvfp4.scales"));
    global = (await golden.readTensorF32("nvfp4.global_scale"))[0]!;
    values = new Float32Array(await golden.readTensorF32("nvfp4.dequant"));
  });

  test("code * block scale * global scale, bit for bit", async () => {
    const reader = await readerOf({
      "m.weight": ["U8", [64, 64], packed],
      "m.weight_scale": ["F8_E4M3", [64, 8], scales],
      "m.weight_scale_2": ["F32", [], f32(global)],
    });
    expect(await readWeightF32(reader, "m.weight")).toEqual(values);
  });

  test("the other naming has the reciprocal of the global scale", async () => {
    const power = 2 ** -7;
    const make = async (name: string, suffix: string, scale: number) => readWeightF32(await readerOf({
      [name]: ["U8", [64, 64], packed],
      "m.weight_scale": ["F8_E4M3", [64, 8], scales],
      [`m.${suffix}`]: ["F32", [1], f32(scale)],
    }), name);
    const divided = await make("m.weight_packed", "weight_global_scale", 1 / power);
    expect(divided).toEqual(await make("m.weight", "weight_scale_2", power));
    expect(divided.some((value) => value !== 0)).toBe(true);
  });

  test("missing or misshapen scales are named", async () => {
    const weight: [DType, number[], Uint8Array] = ["U8", [64, 64], packed];
    const scale: [DType, number[], Uint8Array] = ["F8_E4M3", [64, 8], scales];
    const one: [DType, number[], Uint8Array] = ["F32", [1], f32(1)];
    const fails = async (tensors: Record<string, [DType, number[], Uint8Array]>, message: RegExp) => {
      const reading = readWeightF32(await readerOf(tensors), "m.weight");
      await expect(reading).rejects.toThrow(FormatError);
      await expect(reading).rejects.toThrow(message);
    };
    await fails({ "m.weight": weight }, /"m\.weight": expected its scales in "m\.weight_scale" for U8/);
    await fails({ "m.weight": weight, "m.weight_scale": scale }, /its scales in "m\.weight_scale_2"/);
    const short: [DType, number[], Uint8Array] = ["F8_E4M3", [64, 4], scales.slice(0, 256)];
    await fails({ "m.weight": weight, "m.weight_scale": short, "m.weight_scale_2": one },
      /"m\.weight_scale": expected 512 scales, found 256/);
    const two: [DType, number[], Uint8Array] = ["F32", [2], f32(1, 1)];
    await fails({ "m.weight": weight, "m.weight_scale": scale, "m.weight_scale_2": two },
      /"m\.weight_scale_2": expected 1 scale, found 2/);
    const odd: [DType, number[], Uint8Array] = ["U8", [2, 3], packed.slice(0, 6)];
    await fails({ "m.weight": odd }, /expected blocks of 8 bytes, found \[2, 3\]/);
  });
});

describe("FP8 and plain", () => {
  const codes = encodeFloat("F8_E4M3", Float32Array.of(1, -2, 448, 0.5));
  const weight: [DType, number[], Uint8Array] = ["F8_E4M3", [2, 2], codes];

  test("one scale, or one per row", async () => {
    const reader = await readerOf({
      "a.weight": weight, "a.weight_scale": ["F32", [], f32(0.25)],
      "b.weight": weight, "b.weight_scale": ["F32", [2, 1], f32(2, 10)],
    });
    expect(await readWeightF32(reader, "a.weight")).toEqual(Float32Array.of(0.25, -0.5, 112, 0.125));
    expect(await readWeightF32(reader, "b.weight")).toEqual(Float32Array.of(2, -4, 4480, 5));
  });

  test("without a scale, or with three", async () => {
    const reader = await readerOf({
      "a.weight": weight, "b.weight": weight, "b.weight_scale": ["F32", [3], f32(1, 1, 1)],
    });
    await expect(readWeightF32(reader, "a.weight")).rejects.toThrow(/"a\.weight_scale" for F8_E4M3/);
    await expect(readWeightF32(reader, "b.weight")).rejects.toThrow("expected 1 or 2 scales, found 3");
  });

  test("other floats are read as they are", async () => {
    const bytes = encodeFloat("BF16", Float32Array.of(1.5, -3));
    const reader = await readerOf({ "a.weight": ["BF16", [2], bytes] });
    expect(await readWeightF32(reader, "a.weight")).toEqual(Float32Array.of(1.5, -3));
  });
});

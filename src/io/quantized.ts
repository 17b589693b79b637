/**
 * Weights that a checkpoint stores in 8 or 4 bits with scales beside them, as they are and as float32.
 *
 *   FP8     `m.weight` F8_E4M3, `m.weight_scale` float (one, or one per row): w = code * scale
 *   NVFP4   `m.weight` U8, two E2M1 codes per byte, the even column in the low half; `m.weight_scale`
 *           F8_E4M3, one for 16 columns; `m.weight_scale_2` F32: w = code * scale * scale_2
 *   NVFP4   as above under the names `m.weight_packed` and `m.weight_global_scale`, which divides
 *   MXFP8   `m.weight` F8_E4M3, `m.weight_scale` U8: powers of two 2^(byte - 127), one for 32 columns
 *   MXFP4   `m.weight` U8, `m.weight_scale` U8 likewise
 *
 * What a tensor is, is decided by its own format and its companions, not by metadata.
 * Layouts of ModelOpt and compressed-tensors; they have none for the MX formats, whose scales are stored as
 * their own standard defines them. Tested in test/null/quantized.test.ts.
 */
import { type DType, decodeFloat32, DTYPES } from "../tensor/dtype.ts";
import { FormatError } from "../tensor/errors.ts";
import { sizeOf } from "../tensor/ndarray.ts";
import type { TensorReader } from "./safetensors.ts";

/** Formats of stored weights whose codes have scales. */
export type CodedFormat = "fp8_e4m3" | "mxfp8_e4m3" | "mxfp4" | "nvfp4";

/** Bits of a code, columns that share a scale (0: the tensor or a row), and the format of the scales. */
export const CODED_FORMATS: Readonly<Record<CodedFormat, {
  readonly bits: 8 | 4; readonly block: number; readonly scale: "F32" | "F8_E4M3" | "F8_E8M0";
}>> = {
  fp8_e4m3: { bits: 8, block: 0, scale: "F32" },
  mxfp8_e4m3: { bits: 8, block: 32, scale: "F8_E8M0" },
  mxfp4: { bits: 4, block: 32, scale: "F8_E8M0" },
  nvfp4: { bits: 4, block: 16, scale: "F8_E4M3" },
};

/** A matrix (or a stack of them) as codes and scales. */
export interface CodedWeight {
  readonly format: CodedFormat;
  /** Of the values. */
  readonly shape: readonly number[];
  /** One byte per E4M3 code; two E2M1 codes per byte, the even column in the low half. */
  readonly codes: Uint8Array;
  /** Little-endian f32 of fp8_e4m3, one or one per row; otherwise bytes, one per block. */
  readonly scales: Uint8Array;
  /** NVFP4: the scale of the whole tensor; else 1. */
  readonly global: number;
  /** Whether values are divided by it instead. */
  readonly divides: boolean;
}

/** A weight as a checkpoint stores it: codes with scales, or plain values. */
export type StoredWeight = CodedWeight | { readonly format: null; readonly values: Float32Array };

/**
 * Values of a weight, dequantised if need be. The result has the weight's own shape: for NVFP4 its last
 * dimension is twice that of the stored bytes.
 * Throws FormatError when scales are missing, have another shape or are no positive numbers.
 */
export async function readWeightF32(reader: TensorReader, name: string): Promise<Float32Array> {
  const stored = await readStoredWeight(reader, name);
  return stored.format === null ? stored.values : dequantised(stored);
}

/** The format that a weight is stored in, by the tensors that are there; null: plain values. */
export function storedFormat(
  tensors: ReadonlyMap<string, { readonly dtype: DType }>, name: string,
): CodedFormat | null {
  const { dtype } = tensors.get(name)!;
  if (dtype !== "U8" && dtype !== "F8_E4M3") return null;
  const scale = tensors.get(companion(name, "weight_scale"))?.dtype;
  const powers = scale === "F8_E8M0" || scale === "U8";
  if (dtype === "U8") return powers ? "mxfp4" : "nvfp4";
  return powers ? "mxfp8_e4m3" : "fp8_e4m3";
}

/** Reads a weight without decoding it. Throws as `readWeightF32` does. */
export async function readStoredWeight(reader: TensorReader, name: string): Promise<StoredWeight> {
  const format = storedFormat(reader.tensors, name);
  if (format === null) return { format, values: await readPlain(reader, name) };
  const { shape: stored } = reader.info(name);
  const { bits, block } = CODED_FORMATS[format];
  const columns = ((stored.at(-1) ?? 1) * 8) / bits;
  const shape = bits === 8 ? stored : [...stored.slice(0, -1), columns];
  if (block > 0 && (shape.length < 2 || columns % block !== 0)) {
    throw new FormatError(
      `tensor "${name}": expected rows of whole ${format} blocks of ${block} values, found ${columns} ` +
      "values");
  }
  const scales = block > 0
    ? await readBlockScales(reader, name, format, [...shape.slice(0, -1), columns / block])
    : await readRowScales(reader, name, shape[0] ?? 1);
  const global = format === "nvfp4" ? await readGlobalScale(reader, name) : 1;
  const divides = format === "nvfp4" && isDivided(name);
  return { format, shape, codes: await reader.read(name), scales, global, divides };
}

/** The values that codes and scales stand for. */
export function dequantised({ format, shape, codes, scales, global, divides }: CodedWeight): Float32Array {
  const { bits, block, scale } = CODED_FORMATS[format];
  const values = decodeFloat32(bits === 8 ? "F8_E4M3" : "F4", codes);
  const factors = decodeFloat32(scale, scales);
  const perScale = block > 0 ? block : sizeOf(shape) / factors.length;
  // Code times block scale has few bits and is exact; the last factor makes the one rounding, on storing. A
  // quotient of so few bits by 24 is no closer to the middle of two float32 than float64 can tell.
  for (let i = 0; i < values.length; i++) {
    const value = values[i]! * factors[Math.floor(i / perScale)]!;
    values[i] = divides ? value / global : value * global;
  }
  return values;
}

/** Bytes of a weight's codes and scales. */
export function codedBytes({ codes, scales, format }: CodedWeight): number {
  return codes.length + scales.length + (format === "nvfp4" ? 4 : 0);
}

async function readPlain(reader: TensorReader, name: string): Promise<Float32Array> {
  const values = await reader.readTensorF32(name);
  if (reader.info(name).dtype !== "F8_E5M2") return values;
  const scales = decodeFloat32("F32", await readRowScales(reader, name, reader.info(name).shape[0] ?? 1));
  const perScale = values.length / scales.length;
  return values.map((value, i) => value * scales[Math.floor(i / perScale)]!);
}

/** One scale, or one per row, as f32 bytes. */
async function readRowScales(reader: TensorReader, name: string, rows: number): Promise<Uint8Array> {
  const scaleName = scaleOf(reader, name, "weight_scale");
  const { shape, size } = reader.info(scaleName);
  const fits = size === 1 ? shape.every((extent) => extent === 1)
    : size === rows && shape[0] === rows && shape.slice(1).every((extent) => extent === 1);
  if (!fits) {
    throw new FormatError(
      `tensor "${scaleName}": expected 1 scale or ${rows} scales in [${rows}, 1], found ` +
      `[${shape.join(", ")}]`);
  }
  const scales = await readFloatScales(reader, scaleName);
  return new Uint8Array(scales.buffer, scales.byteOffset, scales.byteLength);
}

/** One byte per block, as stored. */
async function readBlockScales(
  reader: TensorReader, name: string, format: CodedFormat, expected: readonly number[],
): Promise<Uint8Array> {
  const scaleName = scaleOf(reader, name, "weight_scale");
  const { dtype, shape } = reader.info(scaleName);
  const wanted = CODED_FORMATS[format].scale;
  const known = wanted === "F8_E4M3" ? dtype === wanted : dtype === wanted || dtype === "U8";
  if (!known || shape.join() !== expected.join()) {
    throw new FormatError(
      `tensor "${scaleName}": expected ${wanted} [${expected.join(", ")}], found ${dtype} ` +
      `[${shape.join(", ")}]`);
  }
  const scales = await reader.read(scaleName);
  // A block of zeros may have the scale 0.
  const wrong = scales.findIndex((code) => (wanted === "F8_E4M3" ? code > 0x7e : code === 0xff));
  if (wrong >= 0) {
    const found = decodeFloat32(wanted, scales.subarray(wrong, wrong + 1))[0];
    throw new FormatError(
      `tensor "${scaleName}": expected scales that are finite and not negative, found ${found} at ${wrong}`);
  }
  return scales;
}

async function readGlobalScale(reader: TensorReader, name: string): Promise<number> {
  const scaleName = scaleOf(reader, name, isDivided(name) ? "weight_global_scale" : "weight_scale_2");
  const { size } = reader.info(scaleName);
  if (size !== 1) throw new FormatError(`tensor "${scaleName}": expected 1 scale, found ${size}`);
  return (await readFloatScales(reader, scaleName))[0]!;
}

/** Whether the scale of the tensor is one to divide by. */
function isDivided(name: string): boolean {
  return name.endsWith(".weight_packed");
}

/**
 * Scales of floats in whatever format.
 * Throws FormatError for one that is not a positive finite number.
 */
export async function readFloatScales(reader: TensorReader, scaleName: string): Promise<Float32Array> {
  if (DTYPES[reader.info(scaleName).dtype].kind !== "float") {
    throw new FormatError(`tensor "${scaleName}": expected floats, found ${reader.info(scaleName).dtype}`);
  }
  const scales = await reader.readTensorF32(scaleName);
  const wrong = scales.findIndex((scale) => !(scale > 0 && scale < Infinity));
  if (wrong >= 0) {
    const at = scales.length > 1 ? ` at ${wrong}` : "";
    throw new FormatError(
      `tensor "${scaleName}": expected scales that are positive and finite, found ${scales[wrong]}${at}`);
  }
  return scales;
}

function companion(name: string, suffix: string): string {
  return name.replace(/\.(?:weight|weight_packed)$/, `.${suffix}`);
}

/** Names under which the scales of a weight may be found. */
export function companionsOf(name: string): string[] {
  if (!/\.weight(?:_packed)?$/.test(name)) return [];
  return ["weight_scale", "weight_scale_2", "weight_global_scale"].map((suffix) => companion(name, suffix));
}

/** The name of a weight's scales; throws where there are none. */
function scaleOf(reader: TensorReader, name: string, suffix: string): string {
  const scaleName = companion(name, suffix);
  if (scaleName === name || !reader.tensors.has(scaleName)) {
    const { dtype } = reader.info(name);
    throw new FormatError(`tensor "${name}": expected its scales in "${scaleName}" for ${dtype}, found none`);
  }
  return scaleName;
}

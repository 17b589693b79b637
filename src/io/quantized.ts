/**
 * Reads weights that a checkpoint stores in 8 or 4 bits with scales beside them, as float32.
 *
 *   FP8     `m.weight` F8_E4M3, `m.weight_scale` F32 (one, or one per row): w = code * scale
 *   NVFP4   `m.weight` U8, two E2M1 codes per byte, the even column in the low half; `m.weight_scale`
 *           F8_E4M3, one for 16 columns; `m.weight_scale_2` F32: w = code * scale * scale_2
 *   NVFP4   as above under the names `m.weight_packed` and `m.weight_global_scale`, which divides
 *
 * What a tensor is, is decided by its own format and its companions, not by metadata.
 * Layouts of ModelOpt and compressed-tensors. Tested in test/null/quantized.test.ts.
 */
import { e2m1ToF32 } from "../tensor/dtype.ts";
import { FormatError } from "../tensor/errors.ts";
import { sizeOf } from "../tensor/ndarray.ts";
import type { TensorReader } from "./safetensors.ts";

/** Columns that share a scale in NVFP4. */
const BLOCK = 16;

/**
 * Values of a weight, dequantised if need be. The result has the weight's own shape: for NVFP4 its last
 * dimension is twice that of the stored bytes.
 * Throws FormatError when scales are missing or have another shape.
 */
export async function readWeightF32(reader: TensorReader, name: string): Promise<Float32Array> {
  const { dtype } = reader.info(name);
  if (dtype === "U8") return await readNvfp4(reader, name);
  const values = await reader.readTensorF32(name);
  if (dtype !== "F8_E4M3" && dtype !== "F8_E5M2") return values;

  const scaleName = companion(name, "weight_scale");
  const scales = await readScales(reader, name, scaleName);
  const rows = reader.info(name).shape[0] ?? 1;
  if (scales.length !== 1 && scales.length !== rows) {
    throw new FormatError(`tensor "${scaleName}": expected 1 or ${rows} scales, found ${scales.length}`);
  }
  const perScale = values.length / scales.length;
  for (let i = 0; i < values.length; i++) values[i] = values[i]! * scales[Math.floor(i / perScale)]!;
  return values;
}

async function readNvfp4(reader: TensorReader, name: string): Promise<Float32Array> {
  const { shape } = reader.info(name);
  const bytesPerRow = shape.at(-1) ?? 0;
  if (shape.length < 2 || (2 * bytesPerRow) % BLOCK !== 0) {
    const found = `[${shape.join(", ")}]`;
    throw new FormatError(`tensor "${name}": expected blocks of ${BLOCK / 2} bytes, found ${found}`);
  }
  const scaleName = companion(name, "weight_scale");
  const scales = await readScales(reader, name, scaleName);
  const blocks = (2 * sizeOf(shape)) / BLOCK;
  if (scales.length !== blocks) {
    throw new FormatError(`tensor "${scaleName}": expected ${blocks} scales, found ${scales.length}`);
  }
  const global = await globalScale(reader, name);
  const codes = await reader.read(name);
  const values = Float32Array.from({ length: 16 }, (_, code) => e2m1ToF32(code));
  const out = new Float32Array(2 * codes.length);
  for (let i = 0; i < codes.length; i++) {
    // Code times block scale has few bits and is exact; the global scale makes the one rounding, on storing.
    const scale = scales[Math.floor(i / (BLOCK / 2))]!;
    out[2 * i] = values[codes[i]! & 15]! * scale * global;
    out[2 * i + 1] = values[codes[i]! >>> 4]! * scale * global;
  }
  return out;
}

async function globalScale(reader: TensorReader, name: string): Promise<number> {
  const divides = name.endsWith(".weight_packed");
  const scaleName = companion(name, divides ? "weight_global_scale" : "weight_scale_2");
  const scale = await readScales(reader, name, scaleName);
  if (scale.length !== 1) {
    throw new FormatError(`tensor "${scaleName}": expected 1 scale, found ${scale.length}`);
  }
  return divides ? Math.fround(1 / scale[0]!) : scale[0]!;
}

function companion(name: string, suffix: string): string {
  return name.replace(/\.(?:weight|weight_packed)$/, `.${suffix}`);
}

async function readScales(reader: TensorReader, name: string, scaleName: string): Promise<Float32Array> {
  if (scaleName === name || !reader.tensors.has(scaleName)) {
    const { dtype } = reader.info(name);
    throw new FormatError(`tensor "${name}": expected its scales in "${scaleName}" for ${dtype}, found none`);
  }
  return await reader.readTensorF32(scaleName);
}

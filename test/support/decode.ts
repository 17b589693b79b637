/** Weights of quantised checkpoints decoded from their definition, in float64 and apart from `src`. */

/** What a tensor of a file holds. */
export interface Stored {
  readonly dtype: string;
  readonly shape: readonly number[];
  readonly bytes: Uint8Array;
}

/** An element of sign, exponent and fraction bits; exponents of zero are subnormal. */
function decodeBits(code: number, exponentBits: number, fractionBits: number): number {
  const bias = 2 ** (exponentBits - 1) - 1;
  const field = (code >> fractionBits) % 2 ** exponentBits;
  const fraction = (code % 2 ** fractionBits) / 2 ** fractionBits;
  const magnitude = field === 0 ? fraction * 2 ** (1 - bias) : (1 + fraction) * 2 ** (field - bias);
  return code >> (exponentBits + fractionBits) ? -magnitude : magnitude;
}

function scaleAt({ dtype, bytes }: Stored, i: number): number {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (dtype === "F32") return view.getFloat32(4 * i, true);
  if (dtype === "F8_E4M3") return decodeBits(bytes[i]!, 4, 3);
  if (dtype === "U8") return 2 ** (bytes[i]! - 127);
  const word = new DataView(new ArrayBuffer(4)); // BF16
  word.setUint16(2, view.getUint16(2 * i, true), true);
  return word.getFloat32(0, true);
}

/**
 * The values of the matrix `module` in the layouts of ModelOpt and compressed-tensors, each rounded once.
 *
 *   FP8     code * weight_scale, one for the tensor or one for each row
 *   NVFP4   code * weight_scale * weight_scale_2, or under `weight_packed` code * weight_scale /
 *           weight_global_scale; scales for 16 columns, the even column in the low half of a byte
 *   MX      code * 2^(weight_scale - 127), for 32 columns
 */
export function decodeByHand(tensors: ReadonlyMap<string, Stored>, module: string): Float32Array {
  const weight = tensors.get(`${module}.weight`) ?? tensors.get(`${module}.weight_packed`)!;
  const scales = tensors.get(`${module}.weight_scale`)!;
  const [rows, stored] = weight.shape as [number, number];
  const isFour = weight.dtype === "U8";
  const width = isFour ? 2 * stored : stored;
  const across = scales.shape.length === 2 && scales.shape[1]! > 1 ? scales.shape[1]! : 1;
  const perRow = scales.shape[0] === rows;
  const outer = (name: string) => {
    const tensor = tensors.get(`${module}.${name}`);
    return tensor ? scaleAt(tensor, 0) : 1;
  };
  const values = new Float32Array(rows * width);
  for (let row = 0; row < rows; row++) {
    for (let col = 0; col < width; col++) {
      const at = row * width + col;
      const code = isFour ? (weight.bytes[at >> 1]! >> (4 * (col % 2))) % 16 : weight.bytes[at]!;
      const element = isFour ? decodeBits(code, 2, 1) : decodeBits(code, 4, 3);
      const block = Math.floor((col * across) / width);
      const scale = scaleAt(scales, perRow ? row * across + block : block);
      values[at] = (element * scale * outer("weight_scale_2")) / outer("weight_global_scale");
    }
  }
  return values;
}

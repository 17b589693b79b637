import type { Device } from "./device.ts";
import { sizeOf } from "./ndarray.ts";
import { scope } from "./scope.ts";
import { isHalf, type Tensor, type TensorDType } from "./tensor.ts";

/** A binding may start at any multiple of so many bytes. */
const ALIGNMENT = 256;
/** What every device can bind; a larger tensor has a buffer of its own. */
const BUFFER_BYTES = 2 ** 27;

/**
 * Tensors of any contents, side by side in as few buffers as can be, in order. A buffer is free again
 * when the last of its tensors is.
 * @param multiple of which the elements of a buffer are one
 * @param most elements of a buffer, filling included; a tensor of more has one of its own
 */
export function together(
  device: Device, shapes: readonly (readonly number[])[], dtype: TensorDType = "f32", multiple = 1,
  most = Infinity,
): Tensor[] {
  const width = isHalf(dtype) ? 2 : 4;
  const unit = ALIGNMENT / width;
  const limit = Math.min(most, Math.floor(Math.min(BUFFER_BYTES, device.pool.largestBytes) / width));
  const buffers: { size: number; parts: { first: number; shape: readonly number[] }[] }[] = [];
  for (const shape of shapes) {
    const size = Math.ceil(sizeOf(shape) / unit) * unit;
    let buffer = buffers.at(-1);
    if (!buffer || buffer.size + size > limit) buffers.push(buffer = { size: 0, parts: [] });
    buffer.parts.push({ first: buffer.size, shape });
    buffer.size += size;
  }
  return scope(() => buffers.flatMap(({ size, parts }) => {
    const whole = device.empty([Math.ceil(size / multiple) * multiple], dtype);
    return parts.map(({ first, shape }) => whole.range(first, shape));
  }));
}

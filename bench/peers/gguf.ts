/** Writes GGUF files (version 3): typed settings, then tensors of f32 and of blocks of 32. */
import { type Blocks, ggufBlocks } from "./blocks.ts";

/** A whole number is written as u32, a list of them as i32; `{ float }` as f32. */
export type Setting =
  | number | string | boolean | { readonly float: number } | readonly number[] | readonly string[
    ] | Float32Array;

export interface GgufTensor {
  readonly name: string;
  /** The last dimension is the contiguous one. */
  readonly shape: readonly number[];
  readonly data: Float32Array | Blocks;
}

const ALIGNMENT = 32;
const TYPE = { u32: 4, i32: 5, f32: 6, bool: 7, string: 8, array: 9 };
const TENSOR_TYPE = { f32: 0, q4_0: 2, q8_0: 8 };

/** The bytes of a file. */
export function encodeGguf(
  settings: Readonly<Record<string, Setting>>, tensors: readonly GgufTensor[],
): Uint8Array {
  const head = new Writer();
  head.raw(new TextEncoder().encode("GGUF"));
  head.u32(3);
  head.u64(tensors.length);
  head.u64(Object.keys(settings).length);
  for (const [key, value] of Object.entries(settings)) {
    head.text(key);
    writeSetting(head, value);
  }
  const bodies = tensors.map(({ data }) => data instanceof Float32Array
    ? new Uint8Array(data.buffer, data.byteOffset, data.byteLength) : ggufBlocks(data));
  let offset = 0;
  for (const [i, { name, shape, data }] of tensors.entries()) {
    head.text(name);
    head.u32(shape.length);
    for (const n of shape.toReversed()) head.u64(n);
    const { f32, q4_0, q8_0 } = TENSOR_TYPE;
    head.u32(data instanceof Float32Array ? f32 : data.bits === 4 ? q4_0 : q8_0);
    head.u64(offset);
    offset += aligned(bodies[i]!.length);
  }
  const start = aligned(head.length);
  const file = new Uint8Array(start + offset);
  file.set(head.bytes());
  let at = start;
  for (const body of bodies) {
    file.set(body, at);
    at += aligned(body.length);
  }
  return file;
}

const aligned = (n: number) => Math.ceil(n / ALIGNMENT) * ALIGNMENT;

function writeSetting(to: Writer, value: Setting): void {
  if (typeof value === "number") {
    to.u32(TYPE.u32);
    to.u32(value);
  } else if (typeof value === "string") {
    to.u32(TYPE.string);
    to.text(value);
  } else if (typeof value === "boolean") {
    to.u32(TYPE.bool);
    to.raw(Uint8Array.of(+value));
  } else if ("float" in value) {
    to.u32(TYPE.f32);
    to.f32(value.float);
  } else {
    const type = value instanceof Float32Array ? TYPE.f32 : typeof value[
      0] === "string" ? TYPE.string : TYPE.i32;
    to.u32(TYPE.array);
    to.u32(type);
    to.u64(value.length);
    for (const item of value) {
      if (typeof item === "string") to.text(item);
      else if (type === TYPE.f32) to.f32(item);
      else to.u32(item);
    }
  }
}

/** Little-endian bytes that grow. */
class Writer {
  #bytes = new Uint8Array(1 << 16);
  length = 0;

  bytes(): Uint8Array {
    return this.#bytes.subarray(0, this.length);
  }

  raw(data: Uint8Array): void {
    this.#room(data.length);
    this.#bytes.set(data, this.length);
    this.length += data.length;
  }

  u32(value: number): void {
    this.#view(4).setUint32(0, value, true);
  }

  u64(value: number): void {
    this.#view(8).setBigUint64(0, BigInt(value), true);
  }

  f32(value: number): void {
    this.#view(4).setFloat32(0, value, true);
  }

  text(value: string): void {
    const data = new TextEncoder().encode(value);
    this.u64(data.length);
    this.raw(data);
  }

  #view(size: number): DataView {
    this.#room(size);
    this.length += size;
    return new DataView(this.#bytes.buffer, this.length - size, size);
  }

  #room(size: number): void {
    if (this.length + size <= this.#bytes.length) return;
    const larger = new Uint8Array(2 * (this.length + size));
    larger.set(this.bytes());
    this.#bytes = larger;
  }
}

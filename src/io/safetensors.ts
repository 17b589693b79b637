/**
 * Reads and writes safetensors files and sharded checkpoints.
 *
 * A file is: header length (8 bytes, little-endian), JSON header { name: { dtype, shape, data_offsets } } and
 * an optional `__metadata__` of strings, then the data, which the tensors must cover without hole or overlap.
 * Every header is checked completely before the first byte of data is believed.
 * Format: huggingface/safetensors. Tested in test/null/safetensors.test.ts.
 */
import { DTYPES, byteLengthOf, decodeFloat32, decodeInt32, isDType } from "../tensor/dtype.ts";
import type { DType } from "../tensor/dtype.ts";
import { DTypeError, FormatError, UsageError } from "../tensor/errors.ts";
import { MAX_ELEMENTS, sizeOf } from "../tensor/ndarray.ts";
import { isPlainFileName, readAll } from "./files.ts";
import type { ByteSource, Folder } from "./files.ts";
import { isObject, parseJson } from "./json.ts";
import type { JsonValue } from "./json.ts";

/** Largest header accepted, in bytes: that of the reference implementation. */
export const MAX_HEADER = 100_000_000;
/** Largest extent of a dimension. */
export const MAX_DIM = 2 ** 32;
const MAX_RANK = 16;
const INDEX_LIMIT = 64 * 2 ** 20;

export const INDEX_FILE = "model.safetensors.index.json";
export const SINGLE_FILE = "model.safetensors";

export interface TensorInfo {
  readonly name: string;
  readonly dtype: DType;
  readonly shape: readonly number[];
  /** Elements in the tensor. */
  readonly size: number;
  readonly byteLength: number;
  /** Position of the first byte in its file. */
  readonly offset: number;
  readonly file: string;
}

interface Header {
  readonly tensors: readonly TensorInfo[];
  readonly metadata: Readonly<Record<string, string>>;
}

/** Reads and checks the header of one file. Throws FormatError: file, tensor, expected, found. */
export async function readHeader(source: ByteSource): Promise<Header> {
  const { name: file, size } = source;
  if (size < 8) throw new FormatError(`${file}: expected 8 bytes of header length, found ${size} bytes`);
  const lengthBytes = await source.read(0, 8);
  const length = Number(new DataView(lengthBytes.buffer, lengthBytes.byteOffset, 8).getBigUint64(0, true));
  if (length > MAX_HEADER) {
    throw new FormatError(`${file}: expected a header of at most ${MAX_HEADER} bytes, found ${length}`);
  }
  if (length > size - 8) {
    throw new FormatError(`${file}: expected ${length} bytes of header, found ${size - 8} (truncated?)`);
  }
  const text = await source.read(8, length);
  if (text[0] !== 0x7b) {
    throw new FormatError(`${file}: expected a header that starts with "{", found another byte`);
  }
  const header = parseJson(text, { what: `${file} header`, maxDepth: 4 });
  if (!isObject(header)) throw new FormatError(`${file}: expected a JSON object as header`);

  let metadata: Record<string, string> = {};
  const tensors: TensorInfo[] = [];
  for (const [name, entry] of Object.entries(header)) {
    if (name === "__metadata__") metadata = metadataOf(file, entry);
    else tensors.push(tensorOf(file, name, entry, 8 + length));
  }
  // An empty tensor sorts before the one that starts at the same place.
  tensors.sort((a, b) => a.offset - b.offset || a.byteLength - b.byteLength);
  let end = 8 + length;
  let previous = "the header";
  for (const tensor of tensors) {
    if (tensor.offset !== end) {
      const gap = tensor.offset - end;
      const expected = `data right after ${previous}`;
      const found = gap > 0 ? `a hole of ${gap} bytes` : `an overlap of ${-gap} bytes`;
      throw new FormatError(`${file}: tensor "${tensor.name}": expected ${expected}, found ${found}`);
    }
    end += tensor.byteLength;
    previous = `that of "${tensor.name}"`;
  }
  if (end !== size) {
    const found = end > size ? `${size} bytes (truncated?)` : `${size - end} bytes more`;
    throw new FormatError(`${file}: expected a file of ${end} bytes from its header, found ${found}`);
  }
  return { tensors, metadata };
}

function metadataOf(file: string, entry: JsonValue): Record<string, string> {
  if (!isObject(entry)) throw new FormatError(`${file}: expected __metadata__ to be an object of strings`);
  const metadata: Record<string, string> = {};
  for (const [key, value] of Object.entries(entry)) {
    if (typeof value !== "string") {
      const found = JSON.stringify(value);
      throw new FormatError(`${file}: __metadata__ "${key}": expected a string, found ${found}`);
    }
    if (key !== "__proto__") metadata[key] = value;
  }
  return metadata;
}

function tensorOf(file: string, name: string, entry: JsonValue, dataStart: number): TensorInfo {
  const fail = (expected: string, found: unknown): never => {
    const text = JSON.stringify(found) ?? "nothing";
    const short = text.length > 80 ? `${text.slice(0, 80)}...` : text;
    throw new FormatError(`${file}: tensor "${name}": expected ${expected}, found ${short}`);
  };
  if (!isObject(entry)) return fail("an object with dtype, shape and data_offsets", entry);
  const { dtype, shape, data_offsets: offsets } = entry;
  if (typeof dtype !== "string" || !isDType(dtype)) {
    return fail(`a dtype out of ${Object.keys(DTYPES).join(", ")}`, dtype);
  }
  const isShape = Array.isArray(shape) && shape.every((extent) => isIndex(extent, MAX_DIM));
  if (!isShape || shape.length > MAX_RANK) {
    return fail(`a shape of at most ${MAX_RANK} integers from 0 to 2^32`, shape);
  }
  if (!Array.isArray(offsets) || offsets.length !== 2 || !offsets.every((at) => isIndex(at, MAX_ELEMENTS))) {
    return fail("data_offsets of two integers >= 0", offsets);
  }
  const [begin, end] = offsets as [number, number];
  if (begin > end) return fail("data_offsets in ascending order", offsets);
  const extents = shape as number[];
  let size: number;
  try {
    size = sizeOf(extents);
  } catch {
    return fail("at most 2^53 - 1 elements", shape);
  }
  const byteLength = byteLengthOf(dtype, size);
  if (byteLength === null) return fail(`a whole number of bytes, below 2^50, in ${dtype}`, shape);
  if (end - begin !== byteLength) {
    return fail(`${byteLength} bytes for ${dtype} [${extents.join(", ")}]`, end - begin);
  }
  return { name, dtype, shape: extents, size, byteLength, offset: dataStart + begin, file };
}

function isIndex(value: JsonValue, limit: number): value is number {
  return typeof value === "number" && Number.isSafeInteger(value) && value >= 0 && value <= limit;
}

/** A run of elements of a tensor, in row-major order. */
export interface ElementRange {
  readonly start: number;
  readonly count: number;
}

/** The tensors of one or several files, read on demand. */
export class TensorReader {
  readonly tensors: ReadonlyMap<string, TensorInfo>;
  readonly metadata: Readonly<Record<string, string>>;
  private readonly sources: ReadonlyMap<string, ByteSource>;

  constructor(
    tensors: ReadonlyMap<string, TensorInfo>,
    metadata: Readonly<Record<string, string>>,
    sources: ReadonlyMap<string, ByteSource>,
  ) {
    this.tensors = tensors;
    this.metadata = metadata;
    this.sources = sources;
  }

  /** Description of a tensor; throws FormatError when there is none of that name. */
  info(name: string): TensorInfo {
    const info = this.tensors.get(name);
    if (!info) throw new FormatError(`checkpoint: expected a tensor "${name}", found none of that name`);
    return info;
  }

  /** Bytes of a tensor, or of a range of its elements (which must begin and end on whole bytes). */
  async read(name: string, range?: ElementRange): Promise<Uint8Array> {
    const info = this.info(name);
    const source = this.sources.get(info.file)!;
    if (!range) return await source.read(info.offset, info.byteLength);
    const { start, count } = range;
    const isRange = Number.isSafeInteger(start) && Number.isSafeInteger(count) && start >= 0 && count >= 0;
    const found = `${count} elements from ${start}`;
    if (!isRange || count > info.size - start) {
      throw new UsageError(`tensor "${name}": expected a range within ${info.size} elements, found ${found}`);
    }
    const skip = byteLengthOf(info.dtype, start);
    const length = byteLengthOf(info.dtype, count);
    if (skip === null || length === null) {
      throw new UsageError(`tensor "${name}": expected whole bytes of ${info.dtype}, found ${found}`);
    }
    return await source.read(info.offset + skip, length);
  }

  /** Values of a float tensor (any float format) or of a range of it; F64 is rounded, all else is exact. */
  async readTensorF32(name: string, range?: ElementRange): Promise<Float32Array> {
    const { dtype } = this.info(name);
    if (DTYPES[dtype].kind !== "float") {
      throw new DTypeError(`tensor "${name}": expected a float format, found ${dtype}`);
    }
    const bytes = await this.read(name, range);
    // The bytes are ours, so float32 needs no copy where they happen to be aligned.
    if (dtype === "F32" && bytes.byteOffset % 4 === 0) {
      return new Float32Array(bytes.buffer, bytes.byteOffset, bytes.length / 4);
    }
    return decodeFloat32(dtype, bytes);
  }

  /** Values of an integer or BOOL tensor, or of a range of it; throws DTypeError outside the int32 range. */
  async readTensorI32(name: string, range?: ElementRange): Promise<Int32Array> {
    const { dtype } = this.info(name);
    if (DTYPES[dtype].kind !== "int") {
      throw new DTypeError(`tensor "${name}": expected an integer format, found ${dtype}`);
    }
    return decodeInt32(dtype, await this.read(name, range));
  }

  /** Closes the files. */
  async close(): Promise<void> {
    for (const source of this.sources.values()) await source.close();
  }
}

/** Opens one safetensors file. The reader closes `source`, also when this throws. */
export async function openSafetensors(source: ByteSource): Promise<TensorReader> {
  try {
    const { tensors, metadata } = await readHeader(source);
    const byName = new Map(tensors.map((tensor) => [tensor.name, tensor]));
    return new TensorReader(byName, metadata, new Map([[source.name, source]]));
  } catch (error) {
    await source.close();
    throw error;
  }
}

/**
 * Opens the weights in a folder: `model.safetensors.index.json` with its shards, or `model.safetensors`.
 * The index and the shards must agree on every tensor.
 */
export async function openTensors(folder: Folder): Promise<TensorReader> {
  const index = await folder.open(INDEX_FILE);
  if (!index) {
    const single = await folder.open(SINGLE_FILE);
    if (!single) {
      throw new FormatError(`${folder.name}: expected ${SINGLE_FILE} or ${INDEX_FILE}, found neither`);
    }
    return await openSafetensors(single);
  }
  let weightMap: ReadonlyMap<string, string>;
  try {
    weightMap = parseIndex(await readAll(index, INDEX_LIMIT));
  } finally {
    await index.close();
  }
  const sources = new Map<string, ByteSource>();
  try {
    return await openShards(folder, weightMap, sources);
  } catch (error) {
    for (const source of sources.values()) await source.close();
    throw error;
  }
}

/** Reads an index: tensor name to shard file name. Shard names must stay inside the folder. */
export function parseIndex(bytes: Uint8Array | string): Map<string, string> {
  const index = parseJson(bytes, { what: INDEX_FILE });
  const weightMap = isObject(index) ? index["weight_map"] : undefined;
  if (!isObject(weightMap)) {
    throw new FormatError(`${INDEX_FILE}: expected an object "weight_map", found none`);
  }
  const files = new Map<string, string>();
  for (const [name, file] of Object.entries(weightMap)) {
    if (typeof file !== "string" || !isPlainFileName(file) || !file.endsWith(".safetensors")) {
      const expected = "a plain .safetensors file name";
      const found = JSON.stringify(file);
      throw new FormatError(`${INDEX_FILE}: tensor "${name}": expected ${expected}, found ${found}`);
    }
    files.set(name, file);
  }
  return files;
}

async function openShards(
  folder: Folder,
  weightMap: ReadonlyMap<string, string>,
  sources: Map<string, ByteSource>,
): Promise<TensorReader> {
  const tensors = new Map<string, TensorInfo>();
  let metadata: Readonly<Record<string, string>> = {};
  for (const file of new Set(weightMap.values())) {
    const source = await folder.open(file);
    if (!source) {
      throw new FormatError(`${folder.name}: expected the shard ${file} of ${INDEX_FILE}, found no file`);
    }
    sources.set(source.name, source);
    const header = await readHeader(source);
    if (sources.size === 1) ({ metadata } = header);
    for (const tensor of header.tensors) {
      const expected = weightMap.get(tensor.name);
      if (expected !== file) {
        const where = expected === undefined ? "nowhere" : `in ${expected}`;
        const place = `${where} by ${INDEX_FILE}`;
        throw new FormatError(`${file}: tensor "${tensor.name}": expected ${place}, found here`);
      }
      tensors.set(tensor.name, tensor);
    }
  }
  for (const [name, file] of weightMap) {
    if (!tensors.has(name)) {
      throw new FormatError(`${file}: tensor "${name}": expected here by ${INDEX_FILE}, found none`);
    }
  }
  return new TensorReader(tensors, metadata, sources);
}

/** A tensor to write: its bytes, or a function that makes them when their turn comes. */
export interface TensorEntry {
  readonly name: string;
  readonly dtype: DType;
  readonly shape: readonly number[];
  readonly bytes: Uint8Array | (() => Uint8Array | Promise<Uint8Array>);
}

/**
 * The pieces of a safetensors file, to be written one after the other: the header, then one piece per tensor.
 * The same tensors give the same bytes whatever their order: widest format first, then by name. The header is
 * padded with spaces so that the data start at a multiple of 8.
 * Throws UsageError for a name used twice and for bytes that do not fit the shape.
 */
export async function* safetensorsPieces(
  entries: readonly TensorEntry[],
  metadata: Readonly<Record<string, string>> = {},
): AsyncGenerator<Uint8Array> {
  const order = entries.toSorted(
    (a, b) => DTYPES[b.dtype].bits - DTYPES[a.dtype].bits || (a.name < b.name ? -1 : a.name > b.name ? 1 : 0),
  );
  const members: string[] = [];
  const keys = Object.keys(metadata).toSorted();
  if (keys.length > 0) {
    const pairs = keys.map((key) => `${JSON.stringify(key)}:${JSON.stringify(metadata[key])}`);
    members.push(`"__metadata__":{${pairs.join(",")}}`);
  }
  const names = new Set<string>(["__metadata__"]);
  let offset = 0;
  for (const { name, dtype, shape } of order) {
    if (names.has(name)) throw new UsageError(`tensor "${name}": expected each name once, found it twice`);
    names.add(name);
    const length = bytesOf(name, dtype, shape);
    const value = { dtype, shape, data_offsets: [offset, offset + length] };
    members.push(`${JSON.stringify(name)}:${JSON.stringify(value)}`);
    offset += length;
  }
  const text = new TextEncoder().encode(`{${members.join(",")}}`);
  const padded = Math.ceil(text.length / 8) * 8;
  const header = new Uint8Array(8 + padded).fill(0x20);
  new DataView(header.buffer).setBigUint64(0, BigInt(padded), true);
  header.set(text, 8);
  yield header;
  for (const { name, dtype, shape, bytes } of order) {
    const data = typeof bytes === "function" ? await bytes() : bytes;
    const length = bytesOf(name, dtype, shape);
    if (data.length !== length) {
      throw new UsageError(
        `tensor "${name}": expected ${length} bytes for ${dtype} [${shape.join(", ")}], found ${data.length}`,
      );
    }
    yield data;
  }
}

/** A whole safetensors file in memory. */
export async function encodeSafetensors(
  entries: readonly TensorEntry[],
  metadata: Readonly<Record<string, string>> = {},
): Promise<Uint8Array<ArrayBuffer>> {
  const pieces: Uint8Array[] = [];
  for await (const piece of safetensorsPieces(entries, metadata)) pieces.push(piece);
  const file = new Uint8Array(pieces.reduce((sum, piece) => sum + piece.length, 0));
  let at = 0;
  for (const piece of pieces) {
    file.set(piece, at);
    at += piece.length;
  }
  return file;
}

function bytesOf(name: string, dtype: DType, shape: readonly number[]): number {
  const length = byteLengthOf(dtype, sizeOf(shape));
  if (length === null) {
    throw new UsageError(`tensor "${name}": expected whole bytes of ${dtype}, found [${shape.join(", ")}]`);
  }
  return length;
}

/**
 * Files as random-access bytes, wherever they lie: memory, Blobs (files dropped on a page), a web server.
 * Local paths are in files.node.ts. Tested in test/null/safetensors.test.ts.
 */
import { FormatError, UsageError } from "../tensor/errors.ts";

/** One file. `read` returns exactly `length` bytes that belong to the caller, or throws FormatError. */
export interface ByteSource {
  readonly name: string;
  /** Bytes in the file. */
  readonly size: number;
  read(offset: number, length: number): Promise<Uint8Array>;
  close(): Promise<void>;
}

/** Files that belong together: a checkpoint. `open` gives null for a file that is not there. */
export interface Folder {
  readonly name: string;
  open(file: string): Promise<ByteSource | null>;
}

/** True for a name that stays in its folder: no separators, no drive letters, not `.` or `..`. */
export function isPlainFileName(name: string): boolean {
  return /^[^/\\:\p{Cc}]{1,255}$/u.test(name) && name !== "." && name !== "..";
}

/** Throws unless the range lies inside the file. */
export function checkRange(name: string, size: number, offset: number, length: number): void {
  if (!Number.isSafeInteger(offset) || !Number.isSafeInteger(length) || offset < 0 || length < 0) {
    throw new UsageError(`${name}: offset and length must be integers >= 0, found ${offset} and ${length}`);
  }
  if (length > size - offset) {
    throw new FormatError(
      `${name}: expected ${length} bytes at offset ${offset}, found a file of ${size} bytes (truncated?)`,
    );
  }
}

/** A file held in memory; reads are copies. */
export function memorySource(name: string, bytes: Uint8Array): ByteSource {
  return {
    name,
    size: bytes.length,
    async read(offset, length) {
      checkRange(name, bytes.length, offset, length);
      return new Uint8Array(bytes.subarray(offset, offset + length));
    },
    async close() {},
  };
}

/** A Blob or File, read in slices. */
export function blobSource(name: string, blob: Blob): ByteSource {
  return {
    name,
    size: blob.size,
    async read(offset, length) {
      checkRange(name, blob.size, offset, length);
      return new Uint8Array(await blob.slice(offset, offset + length).arrayBuffer());
    },
    async close() {},
  };
}

/**
 * A file on a web server, read by range requests; null when the server answers 404.
 * A server without range support is asked once for the whole file, which then stays in memory.
 */
export async function urlSource(url: string, request: typeof fetch = fetch): Promise<ByteSource | null> {
  const ask = async (range: string): Promise<Response> => {
    const response = await request(url, { headers: { Range: range } });
    if (response.ok || response.status === 404) return response;
    throw new FormatError(`${url}: expected the file, found HTTP status ${response.status}`);
  };
  const first = await ask("bytes=0-0");
  if (first.status === 404) return null;
  if (first.status !== 206) return memorySource(url, new Uint8Array(await first.arrayBuffer()));
  const range = first.headers.get("Content-Range") ?? "";
  // Some servers answer with more than the byte asked for; only the total counts here.
  await first.body?.cancel();
  const total = /^bytes 0-[0-9]+\/([0-9]{1,15})$/.exec(range)?.[1];
  if (total === undefined) {
    throw new FormatError(`${url}: expected a total size in Content-Range, found "${range}"`);
  }
  const size = Number(total);
  return {
    name: url,
    size,
    async read(offset, length) {
      checkRange(url, size, offset, length);
      if (length === 0) return new Uint8Array(0);
      const response = await ask(`bytes=${offset}-${offset + length - 1}`);
      const bytes = new Uint8Array(await response.arrayBuffer());
      if (response.status !== 206 || bytes.length !== length) {
        const found = `${bytes.length} (status ${response.status})`;
        throw new FormatError(`${url}: expected ${length} bytes at offset ${offset}, found ${found}`);
      }
      return bytes;
    },
    async close() {},
  };
}

/** The whole file; throws FormatError when it is larger than `limit` bytes. */
export async function readAll(source: ByteSource, limit: number): Promise<Uint8Array> {
  if (source.size > limit) {
    throw new FormatError(`${source.name}: expected at most ${limit} bytes, found ${source.size}`);
  }
  return await source.read(0, source.size);
}

/** Files in memory, by name. */
export function memoryFolder(name: string, files: Readonly<Record<string, Uint8Array>>): Folder {
  return {
    name,
    async open(file) {
      return Object.hasOwn(files, file) ? memorySource(file, files[file]!) : null;
    },
  };
}

/** Blobs by name: what a file input or a drop gives. */
export function blobFolder(name: string, files: Iterable<Blob & { readonly name: string }>): Folder {
  const byName = new Map([...files].map((file) => [file.name, file]));
  return {
    name,
    async open(file) {
      const blob = byName.get(file);
      return blob ? blobSource(file, blob) : null;
    },
  };
}

/** Files below a URL, which may end in a slash or not. */
export function urlFolder(base: string, request: typeof fetch = fetch): Folder {
  return {
    name: base,
    async open(file) {
      if (!isPlainFileName(file)) {
        throw new UsageError(`${base}: expected a plain file name, found "${file}"`);
      }
      return await urlSource(`${base.replace(/\/+$/, "")}/${encodeURIComponent(file)}`, request);
    },
  };
}

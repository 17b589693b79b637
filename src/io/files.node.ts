/** Local files for Node: folders to read models from, and the operations that checkpoints are made of. */
import { createHash } from "node:crypto";
import { mkdir, open, readFile, readdir, rename, rm, stat } from "node:fs/promises";
import { hostname } from "node:os";
import { dirname, join, resolve } from "node:path";
import { FormatError, UsageError } from "../tensor/errors.ts";
import { checkRange, isPlainFileName, urlFolder } from "./files.ts";
import type { ByteSource, Folder } from "./files.ts";
import type { CheckpointContent, FileLayer } from "./checkpoint_files.ts";

/** Largest single read: system calls take at most 2^31 - 1 bytes. */
const READ_STEP = 2 ** 30;

/** The code of a system error such as ENOENT, or undefined. */
function errorCode(error: unknown): string | undefined {
  return error instanceof Error && "code" in error && typeof error.code === "string" ? error.code : undefined;
}

/** Opens a local file for reading; null when there is none. */
export async function openFile(path: string, name = path): Promise<ByteSource | null> {
  let handle;
  try {
    handle = await open(path, "r");
  } catch (error) {
    if (errorCode(error) === "ENOENT") return null;
    throw error;
  }
  const stat = await handle.stat();
  if (!stat.isFile()) {
    await handle.close();
    throw new FormatError(`${name}: expected a file, found something else`);
  }
  const file = handle;
  return {
    name,
    size: stat.size,
    async read(offset, length) {
      checkRange(name, stat.size, offset, length);
      const bytes = new Uint8Array(length);
      for (let done = 0; done < length; ) {
        const step = Math.min(length - done, READ_STEP);
        const { bytesRead } = await file.read(bytes, done, step, offset + done);
        if (bytesRead === 0) {
          throw new FormatError(`${name}: expected ${length} bytes at offset ${offset}, found ${done}`);
        }
        done += bytesRead;
      }
      return bytes;
    },
    async close() {
      await file.close();
    },
  };
}

/** Files at a local path, or below an http(s) URL. */
export function openFolder(location: string): Folder {
  if (/^https?:\/\//.test(location)) return urlFolder(location);
  return {
    name: location,
    async open(file) {
      if (!isPlainFileName(file)) {
        throw new UsageError(`${location}: expected a plain file name, found "${file}"`);
      }
      return await openFile(join(location, file), file);
    },
  };
}

/** File operations on the local disk. */
export function localFileLayer(): FileLayer {
  const syncPath = async (path: string): Promise<void> => {
    const handle = await open(path, "r");
    try {
      await handle.sync();
    } finally {
      await handle.close();
    }
  };
  return {
    owner: `${hostname()}:${process.pid}`,
    isRunning(owner) {
      const split = owner.lastIndexOf(":");
      if (owner.slice(0, split) !== hostname()) return true;
      try {
        // Signal 0 only asks whether the process exists.
        process.kill(Number(owner.slice(split + 1)), 0);
        return true;
      } catch (error) {
        return errorCode(error) === "EPERM";
      }
    },
    hasher() {
      const hash = createHash("sha256");
      return { update: (bytes) => void hash.update(bytes), digest: () => hash.digest("hex") };
    },
    async makeFolder(path) {
      const first = await mkdir(path, { recursive: true });
      if (first === undefined) return;
      for (let folder = resolve(path); folder.length >= resolve(first).length; folder = dirname(folder)) {
        await syncPath(dirname(folder));
      }
    },
    async create(path) {
      let handle;
      try {
        handle = await open(path, "wx");
      } catch (error) {
        if (errorCode(error) === "EEXIST") return null;
        throw error;
      }
      const file = handle;
      return {
        async write(bytes) {
          for (let done = 0; done < bytes.length; ) {
            const { bytesWritten } = await file.write(bytes, done, Math.min(bytes.length - done, READ_STEP));
            done += bytesWritten;
          }
        },
        sync: () => file.sync(),
        close: () => file.close(),
      };
    },
    syncFolder: syncPath,
    async rename(from, to) {
      await rename(from, to);
    },
    async readText(path) {
      try {
        return await readFile(path, "utf8");
      } catch (error) {
        if (errorCode(error) === "ENOENT") return null;
        throw error;
      }
    },
    async list(path) {
      try {
        return (await readdir(path)).toSorted();
      } catch (error) {
        if (errorCode(error) === "ENOENT") return [];
        throw error;
      }
    },
    async remove(path) {
      await rm(path, { recursive: true, force: true });
    },
    openFile: (path) => openFile(path),
    pause: (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds)),
  };
}

/**
 * Writes a folder that is not there yet: all of it, or nothing.
 * @param inspect sees the finished folder under its temporary path, before it gets its name; what it throws
 *   leaves no folder
 * @throws UsageError when something of that name is there already
 */
export async function writeFolder(
  path: string, files: Readonly<Record<string, CheckpointContent>>,
  inspect: (path: string) => Promise<void> = async () => {},
): Promise<void> {
  const layer = localFileLayer();
  await checkFree(path);
  const unfinished = `${resolve(path)}.tmp-${process.pid}`;
  await layer.remove(unfinished);
  try {
    await layer.makeFolder(unfinished);
    for (const [name, content] of Object.entries(files)) {
      const file = await layer.create(join(unfinished, name));
      if (!file) throw new UsageError(`${name}: expected each file once, found it twice.`);
      try {
        const pieces = typeof content === "string" ? [new TextEncoder().encode(content)]
          : content instanceof Uint8Array ? [content] : content;
        for await (const piece of pieces) await file.write(piece);
        await file.sync();
      } finally {
        await file.close();
      }
    }
    await layer.syncFolder(unfinished);
    await inspect(unfinished);
    await checkFree(path);
    await rename(unfinished, resolve(path));
    await layer.syncFolder(dirname(resolve(path)));
  } finally {
    await layer.remove(unfinished);
  }
}

/** @throws UsageError when there is a file or a folder of that name. */
export async function checkFree(path: string): Promise<void> {
  let found;
  try {
    found = await stat(path);
  } catch (error) {
    if (errorCode(error) === "ENOENT") return;
    throw error;
  }
  const what = found.isDirectory() ? "folder" : "file";
  throw new UsageError(`The output ${path} must not exist yet, found a ${what}.`);
}

/**
 * Checkpoint folders that survive a kill at any moment.
 *
 *   ROOT/step-00000200/...        a finished checkpoint: its files and manifest.json (sizes, SHA-256)
 *   ROOT/latest                   the name of the current one
 *   ROOT/lock                     present while somebody writes
 *   ROOT/*.tmp-new, *.tmp-old     unfinished or half deleted; removed by the next save
 *
 * Order of a save: files, each synced; manifest.json, synced; the folder, synced; rename to the final name;
 * ROOT, synced; `latest`, written aside, synced and renamed; ROOT, synced; old checkpoints, renamed aside and
 * deleted. Whatever operation is the last one, `latest` names a complete checkpoint: the old or the new one.
 * File access goes through a FileLayer, so test/null/checkpoint_files.test.ts can stop after each operation.
 */
import { FormatError, UsageError } from "../tensor/errors.ts";
import { isPlainFileName, readAll } from "./files.ts";
import type { ByteSource } from "./files.ts";
import { isObject, parseJson } from "./json.ts";

export interface WritableFile {
  write(bytes: Uint8Array): Promise<void>;
  /** Returns when the content is on the medium. */
  sync(): Promise<void>;
  close(): Promise<void>;
}

/** The file operations of a checkpoint folder. Paths use `/`. */
export interface FileLayer {
  /** Who is writing: text that no other running process has. */
  readonly owner: string;
  /** False only when the writer is known to be gone. */
  isRunning(owner: string): boolean;
  hasher(): { update(bytes: Uint8Array): void; digest(): string };
  /** Creates a folder and those above it, as needed. Returns when their names are on the medium. */
  makeFolder(path: string): Promise<void>;
  /** Creates a new file; null when it exists. */
  create(path: string): Promise<WritableFile | null>;
  /** Returns when the names inside the folder are on the medium. */
  syncFolder(path: string): Promise<void>;
  /** Moves a file (replacing a file) or a folder (to a name that is free), in one step. */
  rename(from: string, to: string): Promise<void>;
  /** A small text file; null when it is not there. */
  readText(path: string): Promise<string | null>;
  /** Names in a folder; none when it is not there. */
  list(path: string): Promise<string[]>;
  /** Removes a file, or a folder with everything in it; nothing to remove is fine. */
  remove(path: string): Promise<void>;
  openFile(path: string): Promise<ByteSource | null>;
  pause(milliseconds: number): Promise<void>;
}

export type CheckpointContent = Uint8Array | string | AsyncIterable<Uint8Array>;

export interface ManifestEntry {
  readonly name: string;
  readonly size: number;
  /** 64 lower-case hexadecimal digits. */
  readonly sha256: string;
}

export interface SavedCheckpoint {
  readonly name: string;
  readonly path: string;
  readonly step: number;
  readonly files: readonly ManifestEntry[];
  /** Opens a file of the manifest; throws FormatError for any other. */
  open(file: string): Promise<ByteSource>;
  /** Reads a whole file of the manifest. */
  read(file: string): Promise<Uint8Array>;
}

const MANIFEST = "manifest.json";
const LATEST = "latest";
const LOCK = "lock";
const FORMAT = "krait-checkpoint";
const MANIFEST_LIMIT = 16 * 2 ** 20;
const READ_STEP = 8 * 2 ** 20;
const MAX_STEP = 10 ** 12;
const NAME = /^step-([0-9]{8,13})(?:-([1-9][0-9]{0,8}))?$/;

/**
 * Writes one checkpoint and makes it the current one. A step saved before gets a second folder (`step-N-2`):
 * nothing finished is ever changed.
 *
 * @param files what to store, by plain file name
 * @param options.keep how many checkpoints stay, this one included (default 3, at least 1)
 * @returns the name of the new checkpoint's folder
 * Throws UsageError while another process writes to `root`; passes on what the file layer throws, in which
 * case the current checkpoint is still the old one, or already the new one.
 */
export async function saveCheckpoint(
  layer: FileLayer,
  root: string,
  step: number,
  files: Readonly<Record<string, CheckpointContent>>,
  options: { readonly keep?: number } = {},
): Promise<string> {
  const keep = options.keep ?? 3;
  if (!Number.isSafeInteger(keep) || keep < 1) {
    throw new UsageError(`keep: expected an integer >= 1, found ${keep}`);
  }
  if (!Number.isSafeInteger(step) || step < 0 || step > MAX_STEP) {
    throw new UsageError(`step: expected an integer from 0 to ${MAX_STEP}, found ${step}`);
  }
  for (const file of Object.keys(files)) {
    if (!isPlainFileName(file) || file === MANIFEST) {
      throw new UsageError(`${root}: expected a plain file name other than ${MANIFEST}, found "${file}"`);
    }
  }
  await layer.makeFolder(root);
  const token = await acquireLock(layer, root);
  let name: string;
  try {
    name = await writeAndSwitch(layer, root, step, files, keep);
  } catch (error) {
    // Free the disk and the lock if that is still possible; the first error is the one worth reporting.
    await removeLeftovers(layer, root).catch(() => {});
    await releaseLock(layer, root, token).catch(() => {});
    throw error;
  }
  await releaseLock(layer, root, token);
  return name;
}

async function writeAndSwitch(
  layer: FileLayer,
  root: string,
  step: number,
  files: Readonly<Record<string, CheckpointContent>>,
  keep: number,
): Promise<string> {
  await removeLeftovers(layer, root);
  const present = await listCheckpoints(layer, root);
  const name = freeName(step, present);
  await writeFolder(layer, `${root}/${name}.tmp-new`, step, files);
  await layer.rename(`${root}/${name}.tmp-new`, `${root}/${name}`);
  await layer.syncFolder(root);
  await writeFile(layer, `${root}/${LATEST}.tmp-new`, `${name}\n`);
  await layer.rename(`${root}/${LATEST}.tmp-new`, `${root}/${LATEST}`);
  await layer.syncFolder(root);
  for (const old of present.slice(0, Math.max(0, present.length - (keep - 1)))) {
    // First a name that no reader takes for a checkpoint: deleting a folder is not one step.
    await layer.rename(`${root}/${old}`, `${root}/${old}.tmp-old`);
    await layer.remove(`${root}/${old}.tmp-old`);
  }
  return name;
}

async function removeLeftovers(layer: FileLayer, root: string): Promise<void> {
  for (const name of await layer.list(root)) {
    if (name.includes(".tmp-")) await layer.remove(`${root}/${name}`);
  }
}

/**
 * Opens the current checkpoint, or the newest of a given step, and checks every file against the manifest.
 *
 * @param options.step the step to open; without it, the one that `latest` names
 * @param options.verify false skips reading the files to compare SHA-256 (sizes are always compared)
 * @returns null when `root` holds no checkpoint (of that step)
 * Throws FormatError naming the file, the expected and the found size or hash.
 */
export async function openCheckpoint(
  layer: FileLayer,
  root: string,
  options: { readonly step?: number; readonly verify?: boolean } = {},
): Promise<SavedCheckpoint | null> {
  const name = await chooseName(layer, root, options.step);
  if (name === null) return null;
  const path = `${root}/${name}`;
  const { step, files } = await readManifest(layer, path);
  for (const entry of files) await checkFile(layer, path, entry, options.verify ?? true);
  const open = async (file: string): Promise<ByteSource> => {
    const listed = files.some((entry) => entry.name === file);
    const source = listed ? await layer.openFile(`${path}/${file}`) : null;
    if (!source) throw new FormatError(`${path}: expected a file "${file}", found none in ${MANIFEST}`);
    return source;
  };
  return {
    name,
    path,
    step,
    files,
    open,
    async read(file) {
      const source = await open(file);
      try {
        return await readAll(source, Number.MAX_SAFE_INTEGER);
      } finally {
        await source.close();
      }
    },
  };
}

/** Names of the finished checkpoints in `root`, oldest step first. */
export async function listCheckpoints(layer: FileLayer, root: string): Promise<string[]> {
  return sortedNames(await layer.list(root));
}

function sortedNames(names: readonly string[]): string[] {
  const key = (name: string): [number, number] => {
    const match = NAME.exec(name)!;
    return [Number(match[1]), Number(match[2] ?? 1)];
  };
  return names.filter((name) => NAME.test(name)).toSorted((a, b) => {
    const [[stepA, nthA], [stepB, nthB]] = [key(a), key(b)];
    return stepA - stepB || nthA - nthB;
  });
}

function freeName(step: number, present: readonly string[]): string {
  const base = `step-${String(step).padStart(8, "0")}`;
  const same = sortedNames(present).filter((name) => name === base || name.startsWith(`${base}-`));
  const last = same.at(-1);
  if (last === undefined) return base;
  return `${base}-${Number(NAME.exec(last)![2] ?? 1) + 1}`;
}

async function writeFile(layer: FileLayer, path: string, content: CheckpointContent): Promise<ManifestEntry> {
  const file = await layer.create(path);
  if (!file) throw new UsageError(`${path}: expected a free name, found a file`);
  const hash = layer.hasher();
  let size = 0;
  try {
    const pieces = typeof content === "string" ? [new TextEncoder().encode(content)]
      : content instanceof Uint8Array ? [content] : content;
    for await (const piece of pieces) {
      hash.update(piece);
      size += piece.length;
      await file.write(piece);
    }
    await file.sync();
  } finally {
    await file.close();
  }
  return { name: path.slice(path.lastIndexOf("/") + 1), size, sha256: hash.digest() };
}

async function writeFolder(
  layer: FileLayer, path: string, step: number, files: Readonly<Record<string, CheckpointContent>>,
): Promise<void> {
  await layer.makeFolder(path);
  const entries: ManifestEntry[] = [];
  for (const file of Object.keys(files).toSorted()) {
    entries.push(await writeFile(layer, `${path}/${file}`, files[file]!));
  }
  const manifest = { format: FORMAT, version: 1, step, files: entries };
  await writeFile(layer, `${path}/${MANIFEST}`, `${JSON.stringify(manifest, null, 1)}\n`);
  await layer.syncFolder(path);
}

async function chooseName(layer: FileLayer, root: string, step: number | undefined): Promise<string | null> {
  const names = await listCheckpoints(layer, root);
  if (step !== undefined) {
    return names.filter((name) => Number(NAME.exec(name)![1]) === step).at(-1) ?? null;
  }
  const pointer = await layer.readText(`${root}/${LATEST}`);
  // Without a pointer the first save stopped just before writing it: what is there is complete.
  if (pointer === null) return names.at(-1) ?? null;
  const name = pointer.trim();
  if (!names.includes(name)) {
    throw new FormatError(`${root}/${LATEST}: expected the name of a checkpoint beside it, found "${name}"`);
  }
  return name;
}

async function readManifest(
  layer: FileLayer, path: string,
): Promise<{ step: number; files: ManifestEntry[] }> {
  const what = `${path}/${MANIFEST}`;
  const source = await layer.openFile(what);
  if (!source) throw new FormatError(`${what}: expected a manifest, found no file`);
  let text: Uint8Array;
  try {
    text = await readAll(source, MANIFEST_LIMIT);
  } finally {
    await source.close();
  }
  const manifest = parseJson(text, { what });
  if (!isObject(manifest) || manifest["format"] !== FORMAT || manifest["version"] !== 1) {
    throw new FormatError(`${what}: expected format "${FORMAT}" version 1, found something else`);
  }
  const { step, files } = manifest;
  if (typeof step !== "number" || !Number.isSafeInteger(step) || step < 0) {
    throw new FormatError(`${what}: expected "step" to be an integer >= 0, found ${JSON.stringify(step)}`);
  }
  if (!Array.isArray(files)) throw new FormatError(`${what}: expected a list "files", found none`);
  const entries = files.map((entry): ManifestEntry => {
    if (isObject(entry)) {
      const { name, size, sha256 } = entry;
      const named = typeof name === "string" && isPlainFileName(name);
      const sized = typeof size === "number" && Number.isSafeInteger(size) && size >= 0;
      const hashed = typeof sha256 === "string" && /^[0-9a-f]{64}$/.test(sha256);
      if (named && sized && hashed) return { name, size, sha256 };
    }
    throw new FormatError(`${what}: expected name, size and sha256, found ${JSON.stringify(entry)}`);
  });
  return { step, files: entries };
}

async function checkFile(
  layer: FileLayer, path: string, entry: ManifestEntry, verify: boolean,
): Promise<void> {
  const what = `${path}/${entry.name}`;
  const source = await layer.openFile(what);
  if (!source) throw new FormatError(`${what}: expected ${entry.size} bytes, found no file`);
  try {
    if (source.size !== entry.size) {
      throw new FormatError(`${what}: expected ${entry.size} bytes, found ${source.size}`);
    }
    if (!verify) return;
    const hash = layer.hasher();
    for (let at = 0; at < entry.size; at += READ_STEP) {
      hash.update(await source.read(at, Math.min(READ_STEP, entry.size - at)));
    }
    const found = hash.digest();
    if (found !== entry.sha256) {
      throw new FormatError(`${what}: expected SHA-256 ${entry.sha256}, found ${found}`);
    }
  } finally {
    await source.close();
  }
}

/** Tokens of the locks this process holds: a lock of ours that is not among them is left over from before. */
const heldTokens = new Set<string>();

async function acquireLock(layer: FileLayer, root: string): Promise<string> {
  const path = `${root}/${LOCK}`;
  const token = crypto.randomUUID();
  for (let attempt = 0; attempt < 20; attempt++) {
    const file = await layer.create(path);
    if (file) {
      heldTokens.add(token);
      try {
        await file.write(new TextEncoder().encode(`${layer.owner} ${token}\n`));
        await file.close();
      } catch (error) {
        await file.close().catch(() => {});
        await releaseLock(layer, root, token).catch(() => {});
        throw error;
      }
      return token;
    }
    const text = await layer.readText(path);
    if (text === null) continue;
    const [, owner, holder] = /^(.+) (\S+)\n$/.exec(text) ?? [];
    if (owner === undefined || holder === undefined) {
      // Created and not yet written, or the writer died in between: wait for longer than writing takes.
      await layer.pause(attempt < 10 ? 20 : 0);
      if (attempt < 10 || (await layer.readText(path)) !== text) continue;
    } else if (owner === layer.owner ? heldTokens.has(holder) : layer.isRunning(owner)) {
      const advice = `if it is gone, delete ${path}`;
      throw new UsageError(`${root}: expected no other writer, found ${owner} (${advice})`);
    }
    await takeAway(layer, path, text, token);
  }
  throw new UsageError(`${root}: expected to get ${path} within 20 attempts, found it taken each time`);
}

/** Moves a dead writer's lock aside; puts it back when somebody else has replaced it meanwhile. */
async function takeAway(layer: FileLayer, path: string, text: string, token: string): Promise<void> {
  const aside = `${path}.tmp-${token}`;
  try {
    await layer.rename(path, aside);
  } catch (error) {
    if ((await layer.readText(path)) === null) return;
    throw error;
  }
  if ((await layer.readText(aside)) === text) await layer.remove(aside);
  else await layer.rename(aside, path);
}

async function releaseLock(layer: FileLayer, root: string, token: string): Promise<void> {
  // Forget first: if the removal fails, the file that stays is recognised as left over.
  heldTokens.delete(token);
  await layer.remove(`${root}/${LOCK}`);
}

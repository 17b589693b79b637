/** Documents from files and folders. The only part of the data path that needs Node. */
import {
  closeSync, fstatSync, lstatSync, openSync, readFileSync, readSync, readdirSync, statSync,
} from "node:fs";
import { basename, join, resolve } from "node:path";
import { FormatError, UsageError } from "../tensor/errors.ts";
import { type Document, compareNames, parseJsonLines } from "./data.ts";

/** Larger files are refused: a JavaScript string holds at most about 512 million characters. */
const MAX_FILE_BYTES = 256 * 2 ** 20;
/** Text never contains a zero byte, and binary formats nearly always do within their first kilobytes. */
const SNIFF_BYTES = 8192;

/**
 * Yields the documents of files and folders, in the order of `paths`.
 *
 * A file is one document, a `.jsonl` file one document per line (`{"text": ...}`). A folder is walked in
 * sorted order; symbolic links, names that start with a dot, `node_modules`, empty files and files that are
 * not UTF-8 text are passed over. A file given by name must be text.
 *
 * @throws UsageError   when a path does not exist or is neither a file nor a folder
 * @throws FormatError  when a path yields no text, a named file is not text, or a line of a `.jsonl` file is
 *         malformed
 */
export function* iterateDocuments(paths: readonly string[]): Generator<Document> {
  for (const path of paths) {
    const stats = statSync(path, { throwIfNoEntry: false });
    if (!stats) throw new UsageError(`The data path ${path} does not exist.`);
    const name = basename(resolve(path));
    let count = 0;
    if (stats.isDirectory()) {
      for (const relative of walk(path, (entry) => !entry.startsWith(".") && entry !== "node_modules")) {
        const text = readText(join(path, relative));
        if (text === null) continue;
        for (const document of documentsOf(text, `${name}/${relative}`)) yield (count++, document);
      }
      if (count === 0) throw new FormatError(`The folder ${path} holds no text files.`);
    } else if (stats.isFile()) {
      const text = readText(path);
      if (text === null) throw new FormatError(`${path} is not UTF-8 text.`);
      for (const document of documentsOf(text, name)) yield (count++, document);
      if (count === 0) throw new FormatError(`${path} holds no text.`);
    } else {
      throw new UsageError(`The data path ${path} is neither a file nor a folder.`);
    }
  }
}

/**
 * Reads all documents of files and folders (see `iterateDocuments`).
 *
 * @throws UsageError   also when `paths` is empty
 */
export function readDocuments(paths: readonly string[]): Document[] {
  if (paths.length === 0) throw new UsageError("No data was given: name at least one file or folder.");
  return [...iterateDocuments(paths)];
}

export interface DeclarationOptions {
  /** Upper bound for the whole corpus, in UTF-8 bytes. Default 2 MiB. */
  readonly maxBytes?: number;
}

/**
 * Reads the TypeScript declarations (`.d.ts`, `.d.mts`, `.d.cts`) below a `node_modules` folder: a corpus
 * that every checkout has at hand. Files come in the order of their paths; of files that differ in the
 * extension only, and of files with the same text, the first one counts.
 *
 * When there is more than `maxBytes`, every package may keep the same number of bytes; what small packages
 * leave over goes to the others. The file that crosses a package's share ends at a line's end. The result
 * depends on the files alone.
 *
 * @throws UsageError   when the folder does not exist
 * @throws FormatError  when it holds no declarations
 */
export function typescriptDeclarations(nodeModules: string, options: DeclarationOptions = {}): Document[] {
  const { maxBytes = 2 * 2 ** 20 } = options;
  if (!statSync(nodeModules, { throwIfNoEntry: false })?.isDirectory()) {
    throw new UsageError(`The folder ${nodeModules} does not exist; run npm ci first.`);
  }
  const packages = new Map<string, Document[]>();
  const stems = new Set<string>();
  const texts = new Set<string>();
  for (const relative of walk(nodeModules, (entry) => !entry.startsWith("."))) {
    const match = /^(.*)\.d\.[cm]?ts$/.exec(relative);
    if (!match || stems.has(match[1]!)) continue;
    const text = readText(join(nodeModules, relative));
    if (text === null || text === "" || texts.has(text)) continue;
    stems.add(match[1]!);
    texts.add(text);
    const owner = relative.split("/").slice(0, relative.startsWith("@") ? 2 : 1).join("/");
    const files = packages.get(owner) ?? [];
    packages.set(owner, files);
    files.push({ name: relative, text });
  }
  if (packages.size === 0) throw new FormatError(`${nodeModules} holds no TypeScript declarations.`);

  const sizes = [...packages.values()].map((files) => files.reduce((sum, file) => sum + bytes(file.text), 0));
  const share = equalShare(sizes, maxBytes);
  return [...packages.values()].flatMap((files) => keepBytes(files, share));
}

/** The largest share such that the sum of min(size, share) stays within `budget`. */
function equalShare(sizes: readonly number[], budget: number): number {
  let left = budget;
  const ascending = [...sizes].sort((a, b) => a - b);
  for (const [index, size] of ascending.entries()) {
    const share = Math.floor(left / (ascending.length - index));
    if (size > share) return share;
    left -= size;
  }
  return Infinity;
}

function keepBytes(files: readonly Document[], share: number): Document[] {
  const kept: Document[] = [];
  let left = share;
  for (const file of files) {
    const size = bytes(file.text);
    if (size > left) {
      const cut = new TextDecoder().decode(new TextEncoder().encode(file.text).subarray(0, left));
      const text = cut.slice(0, cut.lastIndexOf("\n") + 1);
      if (text !== "") kept.push({ name: file.name, text });
      break;
    }
    kept.push(file);
    left -= size;
  }
  return kept;
}

/**
 * Relative paths of the regular files below `root`, with forward slashes, in the order of their full
 * relative paths.
 */
function walk(root: string, enter: (name: string) => boolean): string[] {
  const found: string[] = [];
  const visit = (relative: string): void => {
    for (const entry of readdirSync(join(root, relative), { withFileTypes: true })) {
      if (!enter(entry.name)) continue;
      const path = relative === "" ? entry.name : `${relative}/${entry.name}`;
      if (entry.isDirectory()) visit(path);
      // lstat: a link is neither, and some file systems do not tell the kind of an entry in its folder.
      else if (entry.isFile() || lstatSync(join(root, path)).isFile()) found.push(path);
    }
  };
  visit("");
  return found.sort(compareNames);
}

function documentsOf(text: string, name: string): Iterable<Document> {
  if (name.toLowerCase().endsWith(".jsonl")) return parseJsonLines(text, name);
  return text === "" ? [] : [{ name, text }];
}

/** The file's text without a byte order mark, or null when it is not UTF-8 text. */
function readText(path: string): string | null {
  const file = openSync(path, "r");
  try {
    const head = new Uint8Array(SNIFF_BYTES);
    if (head.subarray(0, readSync(file, head, 0, SNIFF_BYTES, 0)).includes(0)) return null;
    const { size } = fstatSync(file);
    if (size > MAX_FILE_BYTES) {
      throw new FormatError(
        `${path} has ${size} bytes, expected at most ${MAX_FILE_BYTES}; split it into smaller files.`,
      );
    }
    return decodeText(readFileSync(file));
  } finally {
    closeSync(file);
  }
}

function decodeText(content: Uint8Array): string | null {
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(content);
  } catch {
    return null;
  }
}

function bytes(text: string): number {
  return Buffer.byteLength(text, "utf8");
}

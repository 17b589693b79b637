/**
 * SwiftShader for machines without a Vulkan driver. The npm package `@sparticuz/chromium` carries
 * SwiftShader's driver with its manifest, and a Vulkan loader; both are unpacked once into a cache folder.
 * x86-64 Linux only.
 */
import {
  chmodSync, existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, renameSync, rmSync, statSync,
  writeFileSync,
} from "node:fs";
import { createRequire } from "node:module";
import { homedir, tmpdir, userInfo } from "node:os";
import { delimiter, dirname, join, normalize, resolve, sep } from "node:path";
import { brotliDecompressSync } from "node:zlib";

/** The unpacked driver: `manifest` is for `VK_DRIVER_FILES`, `loader` is the packaged `libvulkan.so.1`. */
export interface SoftwareDriver {
  readonly manifest: string;
  readonly loader: string;
}

/** Unpacks SwiftShader where the package is installed and made for this machine; returns null otherwise. */
export function softwareDriver(): SoftwareDriver | null {
  const archives = packagedArchives();
  if (archives === null) return null;
  const folder = unpackOnce("swiftshader", archives.version, (into) => {
    untar(brotliDecompressSync(readFileSync(join(archives.folder, "swiftshader.tar.br"))), into);
  });
  return { manifest: join(folder, "vk_swiftshader_icd.json"), loader: join(folder, "libvulkan.so.1") };
}

/** The package's archives and its version; null where it is missing or made for another platform. */
export function packagedArchives(): { folder: string; version: string } | null {
  if (process.platform !== "linux" || process.arch !== "x64") return null;
  let entry: string;
  try {
    entry = createRequire(import.meta.url).resolve("@sparticuz/chromium");
  } catch {
    return null;
  }
  for (let root = dirname(entry); root !== dirname(root); root = dirname(root)) {
    const folder = join(root, "bin");
    if (!existsSync(join(folder, "swiftshader.tar.br"))) continue;
    const { version } = JSON.parse(readFileSync(join(root, "package.json"), "utf8")) as { version: string };
    return { folder, version };
  }
  return null;
}

/**
 * Returns the cache folder `NAME-VERSION`, calling `fill` with an empty folder when it does not exist yet.
 * The folder appears under its name only when complete, so any number of processes may call this at the same
 * time.
 */
export function unpackOnce(name: string, version: string, fill: (into: string) => void): string {
  const cache = cacheFolder();
  const target = join(cache, `${name}-${version}`);
  if (existsSync(target)) return target;
  const staging = mkdtempSync(join(cache, `.${name}-`));
  try {
    fill(staging);
    renameSync(staging, target);
  } catch (error) {
    rmSync(staging, { recursive: true, force: true });
    if (!existsSync(target)) throw error;
  }
  return target;
}

/** Writes the files of a ustar archive below `into`, returns their names, refuses links and special files. */
export function untar(archive: Uint8Array, into: string): string[] {
  const text = (at: number, length: number) =>
    Buffer.from(archive.subarray(at, at + length)).toString("utf8").replace(/\0.*$/s, "");
  const names: string[] = [];
  for (let at = 0; at + 512 <= archive.length && archive[at] !== 0;) {
    const size = Number.parseInt(text(at + 124, 12), 8) || 0;
    const type = text(at + 156, 1);
    const name = join(text(at + 345, 155), text(at, 100));
    const path = resolve(into, normalize(name));
    if (!path.startsWith(resolve(into) + sep)) {
      throw new Error(`The archive entry "${name}" leaves its folder.`);
    }
    if (type === "5") {
      mkdirSync(path, { recursive: true });
    } else if (type === "0" || type === "") {
      mkdirSync(dirname(path), { recursive: true });
      writeFileSync(path, archive.subarray(at + 512, at + 512 + size));
      chmodSync(path, Number.parseInt(text(at + 100, 8), 8) & 0o755 | 0o600);
      names.push(name);
    } else {
      throw new Error(`The archive entry "${name}" has type "${type}"; files and folders are expected.`);
    }
    at += 512 + Math.ceil(size / 512) * 512;
  }
  return names;
}

/** Whether the Vulkan loader would find a driver manifest without ours. Follows its documented search. */
export function hasSystemDrivers(): boolean {
  const env = process.env;
  const listed = env["VK_DRIVER_FILES"] || env["VK_ICD_FILENAMES"];
  if (listed) return listed.split(delimiter).some((path) => path !== "" && existsSync(path));
  const home = homedir();
  const roots = [
    env["XDG_CONFIG_HOME"] || join(home, ".config"),
    ...(env["XDG_CONFIG_DIRS"] || "/etc/xdg").split(delimiter),
    "/etc", "/usr/local/etc", "/usr/local/share", "/usr/share",
    env["XDG_DATA_HOME"] || join(home, ".local/share"),
    ...(env["XDG_DATA_DIRS"] || "").split(delimiter),
  ];
  const added = (env["VK_ADD_DRIVER_FILES"] || "").split(delimiter);
  return [...added, ...roots.filter(Boolean).map((root) => join(root, "vulkan/icd.d"))]
    .some((path) => path.endsWith(".json") ? existsSync(path) : hasManifests(path));
}

function hasManifests(folder: string): boolean {
  try {
    return readdirSync(folder).some((name) => name.endsWith(".json"));
  } catch {
    return false;
  }
}

/**
 * A private folder for unpacked files and measurements: the one that KRAIT_CACHE names, the user's cache, or
 * the user's own below the temporary folder.
 */
export function cacheFolder(): string {
  const inHome = process.env["KRAIT_CACHE"] ||
    join(process.env["XDG_CACHE_HOME"] || join(homedir(), ".cache"), "krait");
  const user = userInfo();
  const inTemporary = join(tmpdir(), `krait-${user.uid}`);
  for (const folder of [inHome, inTemporary]) {
    try {
      mkdirSync(folder, { recursive: true, mode: 0o700 });
      // Libraries are loaded from here, so a folder that somebody else prepared must not be trusted.
      const stat = statSync(folder);
      if (stat.uid !== user.uid || (stat.mode & 0o022) !== 0) continue;
      rmSync(mkdtempSync(join(folder, ".probe-")), { recursive: true });
      return folder;
    } catch {
      continue;
    }
  }
  throw new Error(`Neither ${inHome} nor ${inTemporary} is private and writable; set KRAIT_CACHE.`);
}

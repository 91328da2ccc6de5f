/* What the agent's parts share. */
#pragma once

#include "sys.h"

/* The wire; avmm/guest/protocol.py is the other end. Little-endian. Zero bytes between frames mean nothing. */
enum { MAGIC = 0xa5, VERSION = 1 };
enum { PAYLOAD_MAX = 32768 - 12 };
enum { WINDOW = 256 * 1024 }; /* bytes of a stream that may be under way before its reader has asked for more */
enum { T_SYNC = 1, T_SPAWN, T_DATA, T_CREDIT, T_SIGNAL, T_RESIZE, T_HELLO, T_EXIT };
enum { SPAWN_PTY = 1, SPAWN_BUILTIN = 2, SPAWN_NO_INPUT = 4, SPAWN_MERGE = 8 };
enum { SYNC_CLOCK = 1, SYNC_RESEED = 2 };
enum { ENDED_EXITED, ENDED_KILLED, ENDED_NOT_STARTED };

struct frame { uint8_t magic, type; uint16_t stream; uint32_t id, length; };
struct sync { uint8_t nonce[16]; uint32_t flags, pad; int64_t realtime_ns; uint8_t seed[32]; };
struct spawn { uint32_t flags; uint16_t rows, columns; uint32_t argc, envc; char strings[]; };

/* Views of proc, sysfs and devtmpfs that are mounted nowhere: init's own file system stays as it is. -1: none. */
extern int proc_fs, sys_fs, dev_fs;

/* tree.c: copies of files and trees as a stream; each answers an exit code and says on fd 2 what went wrong. */
int tree_unpack(const char *target);
int tree_pack(const char *source);

/* Starts the program of its own name with the C library that lies beside it, so that the system needs to have none.
 *
 *   FOLDER/flanneld, FOLDER/flannel     this launcher, linked statically
 *   FOLDER/glibc/LOADER, libc.so.6 …    the C library
 *   FOLDER/programs/flanneld …          what PyInstaller made, with its libraries in programs/lib
 *
 * Called as mk-docker-opts (by a link to flanneld) it adds that word, by which flanneld knows what is wanted.
 */
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char *base(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

static char *joined(const char *folder, const char *rest, const char *name) {
    size_t size = strlen(folder) + strlen(rest) + strlen(name) + 1;
    char *path = malloc(size);
    if (path)
        snprintf(path, size, "%s%s%s", folder, rest, name);
    return path;
}

int main(int argc, char **argv) {
    char self[PATH_MAX], libraries[3 * PATH_MAX];
    ssize_t length = readlink("/proc/self/exe", self, sizeof self - 1);
    if (length < 0) {
        fprintf(stderr, "flannel: cannot read /proc/self/exe: %s\n", strerror(errno));
        return 1;
    }
    self[length] = '\0';
    const char *name = base(self);
    char *folder = strdup(self);
    char **words = calloc(argc + 4, sizeof *words);
    if (!folder || !words)
        return 1;
    folder[strlen(self) - strlen(name)] = '\0';

    const char *before = getenv("LD_LIBRARY_PATH");
    if (before)
        setenv("FLANNEL_LD_LIBRARY_PATH", before, 1);
    snprintf(libraries, sizeof libraries, "%sprograms/lib:%sglibc", folder, folder);
    setenv("LD_LIBRARY_PATH", libraries, 1);
    setenv("FLANNEL_PROGRAM", self, 1);

    int count = 0;
    words[count++] = joined(folder, "glibc/", LOADER);
    words[count++] = joined(folder, "programs/", name);
    if (argc > 0 && strncmp(base(argv[0]), "mk-docker-opts", 14) == 0)
        words[count++] = "mk-docker-opts";
    for (int i = 1; i < argc; i++)
        words[count++] = argv[i];
    if (words[0] && words[1])
        execv(words[0], words);
    fprintf(stderr, "flannel: cannot start %s: %s\n", words[1] ? words[1] : name, strerror(errno));
    return 1;
}

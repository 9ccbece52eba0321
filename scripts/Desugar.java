import java.io.IOException;
import java.io.OutputStream;
import java.net.URL;
import java.net.URLClassLoader;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Enumeration;
import java.util.HashMap;
import java.util.HashSet;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.TreeMap;
import java.util.jar.JarEntry;
import java.util.jar.JarFile;
import java.util.zip.ZipEntry;
import java.util.zip.ZipOutputStream;
import org.objectweb.asm.ClassReader;
import org.objectweb.asm.ClassWriter;
import org.objectweb.asm.Handle;
import org.objectweb.asm.Opcodes;
import org.objectweb.asm.Type;
import org.objectweb.asm.commons.GeneratorAdapter;
import org.objectweb.asm.commons.Method;
import org.objectweb.asm.tree.AbstractInsnNode;
import org.objectweb.asm.tree.ClassNode;
import org.objectweb.asm.tree.FieldNode;
import org.objectweb.asm.tree.InvokeDynamicInsnNode;
import org.objectweb.asm.tree.MethodInsnNode;
import org.objectweb.asm.tree.MethodNode;

/**
 * Rewrites jars as D8 of the Android SDK does, so that Debian's dx takes them and Android 8 runs them.
 *
 * <p>Lambdas: Android has no LambdaMetafactory, so each becomes a class. Nests: since Java 11 classes of one file reach
 * each other's private members, which Android refuses, so these become package-private. Class files get version 52.
 *
 * <p>java -cp asm.jar:asm-tree.jar:asm-commons.jar Desugar.java OUT.jar IN.jar... writes one jar and then has the JVM
 * verify every class of it.
 */
public final class Desugar {
  private static final String FACTORY = "java/lang/invoke/LambdaMetafactory";
  private static final int NESTS_SINCE = Opcodes.V11;
  private static final int MARKERS = 2;
  private static final int BRIDGES = 4;

  private final Map<String, ClassNode> classes = new TreeMap<>();
  private final Map<String, byte[]> lambdas = new TreeMap<>();
  private final Map<String, Set<String>> opened = new HashMap<>();
  private int nests;

  public static void main(String[] arguments) throws Exception {
    Desugar desugar = new Desugar();
    for (String jar : Arrays.asList(arguments).subList(1, arguments.length)) desugar.read(jar);
    for (ClassNode type : new ArrayList<>(desugar.classes.values())) desugar.rewrite(type);
    desugar.open();
    desugar.write(Path.of(arguments[0]));
    int verified = desugar.verify(Path.of(arguments[0]));
    System.out.printf(
        "%d classes verified; %d lambdas became classes, %d classes opened their private members%n",
        verified, desugar.lambdas.size(), desugar.nests);
  }

  private void read(String name) throws IOException {
    try (JarFile jar = new JarFile(name)) {
      for (Enumeration<JarEntry> entries = jar.entries(); entries.hasMoreElements(); ) {
        JarEntry entry = entries.nextElement();
        String path = entry.getName();
        // Below META-INF lie variants for newer Java.
        if (!path.endsWith(".class") || path.startsWith("META-INF/") || path.endsWith("module-info.class")) continue;
        ClassNode type = new ClassNode();
        new ClassReader(jar.getInputStream(entry).readAllBytes()).accept(type, 0);
        if (classes.put(type.name, type) != null) throw new IllegalStateException(path + " is there twice");
      }
    }
  }

  private void rewrite(ClassNode type) {
    if (type.version >= NESTS_SINCE) {
      ++nests;
      for (FieldNode field : type.fields) field.access &= ~Opcodes.ACC_PRIVATE;
      for (MethodNode method : type.methods) open(type.name, method.name + method.desc);
    }
    type.version = Opcodes.V1_8;
    type.nestHostClass = null;
    type.nestMembers = null;
    type.permittedSubclasses = null;
    for (MethodNode method : type.methods) {
      for (AbstractInsnNode instruction : method.instructions.toArray()) {
        if (!(instruction instanceof InvokeDynamicInsnNode)) continue;
        InvokeDynamicInsnNode site = (InvokeDynamicInsnNode) instruction;
        if (!site.bsm.getOwner().equals(FACTORY)) {
          throw new IllegalStateException(type.name + "." + method.name + " calls " + site.bsm + ", which stays unknown");
        }
        String lambda = type.name + "$$Lambda$" + lambdas.size();
        lambdas.put(lambda, lambdaClass(lambda, site));
        method.instructions.set(site, new MethodInsnNode(Opcodes.INVOKESTATIC, lambda, "create", site.desc, false));
      }
    }
  }

  private void open(String owner, String method) {
    opened.computeIfAbsent(owner, name -> new HashSet<>()).add(method);
  }

  /** Makes the methods that were found package-private; one that then overrides another would change what is called. */
  private void open() {
    Map<String, Set<String>> changed = new HashMap<>();
    opened.forEach((owner, methods) -> {
      ClassNode type = classes.get(owner);
      if (type == null) return; // of the platform, and public
      for (MethodNode method : type.methods) {
        boolean isPrivate = (method.access & Opcodes.ACC_PRIVATE) != 0;
        if (!isPrivate || !methods.contains(method.name + method.desc)) continue;
        method.access &= ~Opcodes.ACC_PRIVATE;
        if ((type.access & Opcodes.ACC_INTERFACE) != 0) method.access |= Opcodes.ACC_PUBLIC; // there is nothing between
        boolean canOverride = (method.access & Opcodes.ACC_STATIC) == 0 && !method.name.startsWith("<");
        if (canOverride) changed.computeIfAbsent(owner, name -> new HashSet<>()).add(method.name + method.desc);
      }
    });
    for (ClassNode type : classes.values()) {
      for (ClassNode up = classes.get(type.superName); up != null; up = classes.get(up.superName)) {
        Set<String> here = changed.getOrDefault(type.name, Set.of()), above = changed.getOrDefault(up.name, Set.of());
        for (MethodNode method : type.methods) {
          String name = method.name + method.desc;
          boolean is = up.methods.stream().anyMatch(m -> name.equals(m.name + m.desc));
          if (is && (here.contains(name) || above.contains(name))) {
            throw new IllegalStateException(type.name + "." + name + " would override " + up.name + "'s");
          }
        }
      }
    }
  }

  /** A class with the captured values as fields, the method that calls the lambda's body, and a factory. */
  private byte[] lambdaClass(String name, InvokeDynamicInsnNode site) {
    Type[] captured = Type.getArgumentTypes(site.desc);
    Type called = (Type) site.bsmArgs[0], instantiated = (Type) site.bsmArgs[2];
    Handle body = (Handle) site.bsmArgs[1];
    List<String> interfaces = new ArrayList<>(List.of(Type.getReturnType(site.desc).getInternalName()));
    List<Type> bridges = new ArrayList<>(List.of(called));
    alternatives(site, interfaces, bridges);

    ClassWriter out = new ClassWriter(ClassWriter.COMPUTE_MAXS);
    int flags = Opcodes.ACC_FINAL | Opcodes.ACC_SYNTHETIC;
    out.visit(Opcodes.V1_8, flags, name, null, "java/lang/Object", interfaces.toArray(new String[0]));
    Type self = Type.getObjectType(name);
    Method constructor = new Method("<init>", Type.VOID_TYPE, captured);
    GeneratorAdapter code = method(out, 0, constructor);
    code.loadThis();
    code.invokeConstructor(Type.getType(Object.class), new Method("<init>", "()V"));
    for (int i = 0; i < captured.length; ++i) {
      out.visitField(Opcodes.ACC_PRIVATE | Opcodes.ACC_FINAL, "f" + i, captured[i].getDescriptor(), null, null);
      code.loadThis();
      code.loadArg(i);
      code.putField(self, "f" + i, captured[i]);
    }
    end(code);
    code = method(out, Opcodes.ACC_STATIC, new Method("create", site.desc));
    code.newInstance(self);
    code.dup();
    code.loadArgs();
    code.invokeConstructor(self, constructor);
    end(code);
    for (Type bridge : bridges) {
      code = method(out, Opcodes.ACC_PUBLIC, new Method(site.name, bridge.getDescriptor()));
      call(code, self, captured, bridge, instantiated, body);
      end(code);
    }
    out.visitEnd();
    return out.toByteArray();
  }

  /** What altMetafactory says besides: marker interfaces and further signatures of the method. */
  private static void alternatives(InvokeDynamicInsnNode site, List<String> interfaces, List<Type> bridges) {
    if (!site.bsm.getName().equals("altMetafactory")) return;
    int flags = (Integer) site.bsmArgs[3], at = 4;
    if ((flags & MARKERS) != 0) {
      int count = (Integer) site.bsmArgs[at++];
      for (int i = 0; i < count; ++i) interfaces.add(((Type) site.bsmArgs[at++]).getInternalName());
    }
    if ((flags & BRIDGES) != 0) {
      int count = (Integer) site.bsmArgs[at++];
      for (int i = 0; i < count; ++i) bridges.add((Type) site.bsmArgs[at++]);
    }
    if ((flags & 1) != 0 && !interfaces.contains("java/io/Serializable")) interfaces.add("java/io/Serializable");
  }

  /** Calls a lambda's body with the captured values and the method's arguments, and returns what it returns. */
  private void call(
      GeneratorAdapter code, Type self, Type[] captured, Type called, Type instantiated, Handle body) {
    boolean isNew = body.getTag() == Opcodes.H_NEWINVOKESPECIAL;
    boolean hasReceiver = !isNew && body.getTag() != Opcodes.H_INVOKESTATIC;
    Type owner = Type.getObjectType(body.getOwner());
    List<Type> wanted = new ArrayList<>(Arrays.asList(Type.getArgumentTypes(body.getDesc())));
    if (hasReceiver) wanted.add(0, owner);
    if (isNew) {
      code.newInstance(owner);
      code.dup();
    }
    for (int i = 0; i < captured.length; ++i) {
      code.loadThis();
      code.getField(self, "f" + i, captured[i]);
      adapt(code, captured[i], captured[i], wanted.get(i));
    }
    Type[] given = called.getArgumentTypes(), exact = instantiated.getArgumentTypes();
    for (int i = 0; i < given.length; ++i) {
      code.loadArg(i);
      adapt(code, given[i], exact[i], wanted.get(captured.length + i));
    }
    int opcode = Map.of(
            Opcodes.H_INVOKESTATIC, Opcodes.INVOKESTATIC,
            Opcodes.H_INVOKEINTERFACE, Opcodes.INVOKEINTERFACE,
            Opcodes.H_NEWINVOKESPECIAL, Opcodes.INVOKESPECIAL)
        .getOrDefault(body.getTag(), body.isInterface() ? Opcodes.INVOKEINTERFACE : Opcodes.INVOKEVIRTUAL);
    code.visitMethodInsn(opcode, body.getOwner(), body.getName(), body.getDesc(), body.isInterface());
    open(body.getOwner(), body.getName() + body.getDesc());
    Type made = isNew ? owner : Type.getReturnType(body.getDesc()), returned = called.getReturnType();
    if (returned.getSort() == Type.VOID) {
      if (made.getSize() == 1) code.pop();
      if (made.getSize() == 2) code.pop2();
    } else {
      adapt(code, made, made, returned);
    }
  }

  /** The value on the stack as another type: boxed, unboxed, widened or cast as LambdaMetafactory would. */
  private static void adapt(GeneratorAdapter code, Type from, Type exact, Type to) {
    boolean isObject = from.getSort() >= Type.ARRAY, wantsObject = to.getSort() >= Type.ARRAY;
    if (isObject && wantsObject) {
      if (!from.equals(to)) code.checkCast(to);
    } else if (isObject) {
      code.unbox(to);
    } else if (wantsObject) {
      code.valueOf(from);
    } else if (!from.equals(to)) {
      code.cast(from, to);
    }
  }

  private static GeneratorAdapter method(ClassWriter out, int access, Method method) {
    GeneratorAdapter code = new GeneratorAdapter(access, method, null, null, out);
    code.visitCode();
    return code;
  }

  private static void end(GeneratorAdapter code) {
    code.returnValue();
    code.endMethod();
  }

  private void write(Path out) throws IOException {
    try (OutputStream file = Files.newOutputStream(out); ZipOutputStream jar = new ZipOutputStream(file)) {
      for (ClassNode type : classes.values()) {
        ClassWriter writer = new ClassWriter(0);
        type.accept(writer);
        add(jar, type.name, writer.toByteArray());
      }
      for (Map.Entry<String, byte[]> lambda : lambdas.entrySet()) add(jar, lambda.getKey(), lambda.getValue());
    }
  }

  private static void add(ZipOutputStream jar, String name, byte[] data) throws IOException {
    ZipEntry entry = new ZipEntry(name + ".class");
    entry.setTime(0);
    jar.putNextEntry(entry);
    jar.write(data);
    jar.closeEntry();
  }

  /** Has the JVM link every class; what a class then does or lacks (Android's own classes) is not asked. */
  private int verify(Path jar) throws IOException {
    int count = 0;
    URL[] urls = {jar.toUri().toURL()};
    List<String> names = new ArrayList<>(classes.keySet());
    names.addAll(lambdas.keySet());
    try (URLClassLoader loader = new URLClassLoader(urls, ClassLoader.getPlatformClassLoader())) {
      for (String name : names) {
        try {
          Class.forName(name.replace('/', '.'), true, loader);
          ++count;
        } catch (VerifyError | ClassFormatError | IncompatibleClassChangeError error) {
          throw error;
        } catch (Throwable missing) { // of Android, or of a native library
          continue;
        }
      }
    }
    return count;
  }
}

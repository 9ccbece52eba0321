import org.jetbrains.kotlin.gradle.dsl.JvmTarget

plugins {
    alias(libs.plugins.android.library)
    alias(libs.plugins.kotlin.android)
}

android {
    namespace = "ai.lordba.demo.runtime"
    compileSdk =
        libs.versions.compileSdk
            .get()
            .toInt()
    ndkVersion = "28.2.13676358" // r28 and newer align libraries to pages of 16 KB

    defaultConfig {
        minSdk =
            libs.versions.minSdk
                .get()
                .toInt()
        ndk { abiFilters += "arm64-v8a" }
        consumerProguardFiles("consumer-rules.pro")
        externalNativeBuild {
            cmake {
                arguments += "-DANDROID_STL=c++_static"
                // -Plordba.executorch=FOLDER, an ExecuTorch built with the NDK; without it the app runs ONNX bundles alone.
                providers.gradleProperty("lordba.executorch").orNull?.let { arguments += "-DLORDBA_EXECUTORCH=$it" }
            }
        }
    }

    externalNativeBuild {
        cmake {
            path = file("src/main/cpp/CMakeLists.txt")
            version = "3.31.6"
        }
    }

    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_17
        targetCompatibility = JavaVersion.VERSION_17
    }
}

kotlin {
    compilerOptions {
        jvmTarget = JvmTarget.JVM_17
        allWarningsAsErrors = true
    }
}

dependencies {
    api(project(":core"))
    implementation(libs.gson)
    implementation(libs.onnxruntime.android)
}
